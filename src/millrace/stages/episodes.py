"""Episodes: prompts to the fleet, answers to the environments, rewards back.

Rank 0 plays; the other ranks follow it, because an engine that was lost and restarted is given its weights by all of
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.config.schema import DomainConfig, SamplingConfig
from millrace.data.datasets import PromptDataset
from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Environment, Message, Observation, Reward
from millrace.environments.gym_rows import plain_row
from millrace.observe.console import RunConsole
from millrace.rollout.fleet import Fleet
from millrace.rollout.member import FleetNeedsSync
from millrace.rollout.types import Request, Rollout, SamplingParams
from millrace.rollout.weight_sync import WeightSync
from millrace.stages.control import ControlGroup


@dataclass(frozen=True)
class Episode:
    """One prompt of one domain, to be answered n times."""

    id: str
    domain: str
    row: Mapping[str, Any]
    messages: Sequence[Message]
    prompt: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Scored:
    """One answer with its reward."""

    rollout: Rollout
    text: str
    reward: Reward


@dataclass(frozen=True)
class Group:
    """All answers to one prompt."""

    episode: Episode
    answers: tuple[Scored, ...]

    @property
    def rewards(self) -> list[float]:
        return [answer.reward.value for answer in self.answers]


class Domain:
    """A domain's environment with its two data sets."""

    def __init__(self, name: str, config: DomainConfig, environment: Environment, tokenizer: ChatTokenizer) -> None:
        self.name, self.environment = name, environment
        self._system, self._tokenizer = config.system_prompt, tokenizer
        self.train, self.held_out = (
            PromptDataset(path, environment.required_fields, environment.validate, plain_row)
            for path in (config.train, config.held_out)
        )

    def episode(self, dataset: PromptDataset, index: int, seed: int) -> Episode:
        row = dataset[index]
        messages = list(self.environment.reset(row))
        if self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        prompt = tuple(self._tokenizer.render_prompt(messages))
        return Episode(dataset.row_id(index), self.name, row, messages, prompt, seed)

    def require_room(self, dataset: PromptDataset, context: int, answer: int) -> None:
        """Raises DataError, naming the row, for a prompt that leaves less than `answer` of `context` tokens."""
        for index in range(len(dataset)):
            length = len(self.episode(dataset, index, seed=0).prompt)
            if length + answer > context:
                raise DataError(
                    f"{dataset.where(index)}: the prompt has {length} tokens, so that an answer of "
                    f"max_response_tokens {answer} does not fit into fleet.max_model_len {context}; leave the row out, "
                    "raise fleet.max_model_len or lower max_response_tokens"
                )


class EpisodePlayer:
    def __init__(
        self,
        control: ControlGroup,
        sync: WeightSync,
        tokenizer: ChatTokenizer,
        fleet: Fleet | None,
        domains: Mapping[str, Domain],
        console: RunConsole | None,
    ) -> None:
        """`fleet`, `domains` and `console` are rank 0's; elsewhere None, empty and None."""
        self.domains = domains
        self._control, self._sync, self._tokenizer = control, sync, tokenizer
        self._fleet, self._console = fleet, console
        self._loop = asyncio.new_event_loop()

    def play(self, episodes: Sequence[Episode], sampling: SamplingConfig, n: int, what: str) -> list[Group]:
        """Answer each episode n times and score the answers. Collective; rank 0 gets the groups, the others nothing.

        `what` names the wait on the progress bar. Raises Stopped on every rank when the run is asked to stop meanwhile.
        """
        requests = [self._request(episode, sampling, n) for episode in episodes]
        rollouts = self._generate(requests, what)
        if self._fleet is None:
            return []
        return self._loop.run_until_complete(self._score(episodes, rollouts))

    def _request(self, episode: Episode, sampling: SamplingConfig, n: int) -> Request:
        params = SamplingParams(
            n=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_response_tokens,
            stop_token_ids=tuple(self._tokenizer.stop_token_ids),
            seed=episode.seed,
        )
        return Request(f"{episode.domain}/{episode.id}/{episode.seed}", episode.prompt, params)

    def _generate(self, requests: Sequence[Request], what: str) -> list[list[Rollout]]:
        rollouts: list[list[Rollout]] = []
        while True:
            complete = self._control.on_main_until_stopped(lambda: self._try_generate(requests, what, rollouts))
            if complete:
                return rollouts
            self._sync.resync_if_needed()

    def _try_generate(self, requests: Sequence[Request], what: str, rollouts: list[list[Rollout]]) -> bool:
        assert self._fleet is not None and self._console is not None
        answers = sum(request.sampling.n for request in requests)
        with self._console.bar(what, answers) as bar:
            try:
                rollouts[:] = self._fleet.generate(
                    list(requests), on_progress=lambda done, total, tokens: bar.update(done, f"{tokens:,} tokens")
                )
            except FleetNeedsSync as lost:
                self._console.say(str(lost))
                return False
        return True

    async def _score(self, episodes: Sequence[Episode], rollouts: Sequence[Sequence[Rollout]]) -> list[Group]:
        scored = await asyncio.gather(
            *(
                self._score_one(episode, rollout)
                for episode, answers in zip(episodes, rollouts, strict=True)
                for rollout in answers
            )
        )
        answers = iter(scored)
        return [
            Group(episode, tuple(next(answers) for _ in group))
            for episode, group in zip(episodes, rollouts, strict=True)
        ]

    async def _score_one(self, episode: Episode, rollout: Rollout) -> Scored:
        text = self._tokenizer.decode(rollout.answer)
        outcome = await self.domains[episode.domain].environment.step(episode.row, episode.messages, text)
        if isinstance(outcome, Observation):
            raise ValueError(
                f"domain {episode.domain}: its environment asks for another turn, and this stage plays single-turn "
                "episodes; use a single-turn environment here"
            )
        return Scored(rollout, text, outcome)

    def close(self) -> None:
        for domain in self.domains.values():
            self._loop.run_until_complete(domain.environment.close())
        self._loop.close()
