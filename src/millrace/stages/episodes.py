"""Episodes: prompts to the fleet, answers to the environments, rewards back.

Rank 0 plays; the other ranks follow it, because an engine that was lost and restarted is given its weights by all of
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.config.schema import CurriculumConfig, DomainConfig, SamplingConfig
from millrace.data.curriculum import ChosenRows, choose_rows, rates_of_rows, read_pass_rates
from millrace.data.datasets import PromptDataset
from millrace.data.errors import DataError
from millrace.data.messages import form_problem
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import (
    Comparison,
    Environment,
    GroupEnvironment,
    Message,
    Observation,
    ReportingEnvironment,
    Reward,
    TurnEnvironment,
)
from millrace.environments.gym_rows import plain_row
from millrace.environments.judge import WAY_OUT_OF_UNPARSABLE, JudgeError
from millrace.observe.console import Bar, RunConsole
from millrace.rollout.fleet import Fleet
from millrace.rollout.member import FleetNeedsSync
from millrace.rollout.types import Request, Rollout, SamplingParams
from millrace.stages.control import Control

WAIT_LOG_SECONDS = 10.0


NOT_SCORED = Reward(0.0, "not scored")


@dataclass(frozen=True)
class Episode:
    """One prompt of one domain, to be answered n times."""

    id: str
    domain: str
    row: Mapping[str, Any]
    messages: Sequence[Message]
    prompt: tuple[int, ...]
    seed: int
    scored: bool = True
    """Whether its answers are given rewards; where a teacher alone speaks of them, they may do without."""
    opening: str = ""
    """What of the answer stands in the prompt: the `<think>` that a thinking form opens. Environments read it with the
    answer, or else reasoning that never ends would pass for an answer."""


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

    def __init__(
        self, name: str, config: DomainConfig, environment: Environment | TurnEnvironment, tokenizer: ChatTokenizer
    ) -> None:
        self.name, self.environment = name, environment
        self._system, self._tokenizer, self._pass_rates = config.system_prompt, tokenizer, config.pass_rates
        self._thinking = config.thinking

        def check(row: Mapping[str, Any]) -> str | None:
            return environment.validate(row) or form_problem(row)

        self.train = PromptDataset(config.train, environment.required_fields, check, plain_row)
        alone = (
            environment.held_out_fields if isinstance(environment, GroupEnvironment) else environment.required_fields
        )
        self.held_out = PromptDataset(config.held_out, alone, check, plain_row)

    @property
    def compares(self) -> bool:
        """Whether rewards in training come from comparing the answers of a group."""
        return isinstance(self.environment, GroupEnvironment)

    def episode(self, dataset: PromptDataset, index: int, seed: int, *, scored: bool = True) -> Episode:
        row = dataset[index]
        messages = list(self.environment.reset(row))
        if self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        own = row.get("thinking")
        try:
            prompt = self._tokenizer.render_prompt(
                messages, tools=row.get("tools"), thinking=self._thinking if own is None else own
            )
        except DataError as error:
            raise DataError(f"{dataset.where(index)}: {error}") from error
        return Episode(
            id=dataset.row_id(index),
            domain=self.name,
            row=row,
            messages=messages,
            prompt=tuple(prompt),
            seed=seed,
            scored=scored,
            opening=self._tokenizer.answer_opening(prompt),
        )

    def training_rows(self, curriculum: CurriculumConfig) -> int | ChosenRows:
        """The training rows that a stage draws: how many there are, or those its curriculum chooses.

        Raises DataError for a row without a pass rate, and when none is left.
        """
        if curriculum == CurriculumConfig():
            return len(self.train)
        assert self._pass_rates is not None, "the recipe's rules ask for pass rates"
        path = Path(self._pass_rates)
        chosen = choose_rows(
            rates_of_rows(self.train, read_pass_rates(path), path),
            above=curriculum.above,
            below=curriculum.below,
            easy_to_hard=curriculum.order == "easy_to_hard",
        )
        if not len(chosen):
            bounds = ((chosen.too_hard, "above", curriculum.above), (chosen.too_easy, "below", curriculum.below))
            why = " and ".join(
                f"{count} are not {word} {bound:g}" for count, word, bound in bounds if bound is not None
            )
            raise DataError(
                f"domain {self.name}: the curriculum leaves none of {len(self.train)} training prompts, for by {path} "
                f"{why}; widen its bounds, or take other prompts"
            )
        return chosen

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
        control: Control,
        resync: Callable[[], object],
        tokenizer: ChatTokenizer,
        fleet: Fleet | None,
        domains: Mapping[str, Domain],
        console: RunConsole | None,
    ) -> None:
        """`fleet`, `domains` and `console` are rank 0's; elsewhere None, empty and None. `resync` gives engines that
        were restarted the weights of the others; every rank calls it."""
        self.domains = domains
        self._control, self._resync, self._tokenizer = control, resync, tokenizer
        self._fleet, self._console = fleet, console
        self._loop = asyncio.new_event_loop()

    def play(
        self,
        episodes: Sequence[Episode],
        sampling: SamplingConfig,
        n: int,
        what: str,
        comparison: Comparison | None = None,
    ) -> list[Group]:
        """Answer each episode n times and score the answers. Collective; rank 0 gets the groups, the others nothing.

        `what` names the wait on the progress bar. With a `comparison` the answers of a group are compared where their
        domain can; else each is scored alone. Raises Stopped on every rank when the run is asked to stop meanwhile.
        """
        requests = [self._request(episode, sampling, n) for episode in episodes]
        rollouts = self._generate(requests, what)
        groups: list[Group] = []
        self._control.on_main_until_stopped(lambda: groups.extend(self.score(episodes, rollouts, what, comparison)))
        return groups

    def play_alone(
        self,
        episodes: Sequence[Episode],
        sampling: SamplingConfig,
        n: int,
        what: str,
        comparison: Comparison | None = None,
    ) -> list[Group]:
        """Like `play`, by rank 0 in a thread of its own while the ranks train; nothing else is played meanwhile.

        Raises FleetNeedsSync when all engines were lost: only the ranks together can give them weights.
        """
        rollouts = self._rollouts([self._request(episode, sampling, n) for episode in episodes], what)
        return self.score(episodes, rollouts, what, comparison)

    def score(
        self,
        episodes: Sequence[Episode],
        rollouts: Sequence[Sequence[Rollout]],
        what: str,
        comparison: Comparison | None = None,
    ) -> list[Group]:
        """The answers with their rewards, on rank 0. Ctrl-C cancels what is under way.

        Raises JudgeError when a judge decided not one of several verdicts of a domain: their rewards tell nothing.
        """
        assert self._console is not None
        with self._console.bar(f"{what}: rewards", len(episodes)) as bar:
            work = self._loop.create_task(self._score_all(episodes, rollouts, what, comparison, bar))
            try:
                groups = self._loop.run_until_complete(work)
            except KeyboardInterrupt:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
                    self._loop.run_until_complete(work)
                raise
        if sentence := undecided(groups):
            self._console.say(f"{what}: {sentence}")
        for name in dict.fromkeys(group.episode.domain for group in groups):
            environment = self.domains[name].environment
            if isinstance(environment, ReportingEnvironment):
                self._console.say(f"{what}: {name}: {environment.summary()}")
        for name in self.domains:
            _require_a_verdict(name, [group for group in groups if group.episode.domain == name], what)
        return groups

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
            self._resync()

    def _try_generate(self, requests: Sequence[Request], what: str, rollouts: list[list[Rollout]]) -> bool:
        try:
            rollouts[:] = self._rollouts(requests, what)
        except FleetNeedsSync as lost:
            assert self._console is not None
            self._console.say(str(lost))
            return False
        return True

    def _rollouts(self, requests: Sequence[Request], what: str) -> list[list[Rollout]]:
        assert self._fleet is not None and self._console is not None
        answers = sum(request.sampling.n for request in requests)
        with self._console.bar(what, answers) as bar:
            return self._fleet.generate(
                list(requests), on_progress=lambda done, total, tokens: bar.update(done, f"{tokens:,} tokens")
            )

    async def _score_all(
        self,
        episodes: Sequence[Episode],
        rollouts: Sequence[Sequence[Rollout]],
        what: str,
        comparison: Comparison | None,
        bar: Bar,
    ) -> list[Group]:
        tasks = [
            asyncio.create_task(self._score_group(episode, answers, comparison))
            for episode, answers in zip(episodes, rollouts, strict=True)
        ]
        for task in tasks:
            task.add_done_callback(lambda _: bar.update(sum(each.done() for each in tasks)))
        try:
            await self._wait_for(tasks, what)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]

    async def _wait_for(self, tasks: Sequence[asyncio.Task[Group]], what: str) -> None:
        """Wait for all, or raise what the first one that failed raised; a line every ten seconds says how far it is."""
        assert self._console is not None
        began, pending = time.monotonic(), set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, timeout=WAIT_LOG_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if pending:
                scored, seconds = len(tasks) - len(pending), time.monotonic() - began
                self._console.say(f"{what}: waiting for rewards, {scored} of {len(tasks)} groups in {seconds:.0f} s")

    async def _score_group(self, episode: Episode, rollouts: Sequence[Rollout], comparison: Comparison | None) -> Group:
        environment = self.domains[episode.domain].environment
        if comparison is None or not isinstance(environment, GroupEnvironment):
            return Group(episode, tuple(await asyncio.gather(*(self._score_one(episode, each) for each in rollouts))))
        texts = [self._text(episode, rollout) for rollout in rollouts]
        uncut = [None if r.finish_reason == "length" else text for r, text in zip(rollouts, texts, strict=True)]
        rewards = await environment.score_group(episode.row, episode.messages, uncut, comparison)
        return Group(episode, tuple(map(Scored, rollouts, texts, rewards)))

    async def _score_one(self, episode: Episode, rollout: Rollout) -> Scored:
        text, environment = self._text(episode, rollout), self.domains[episode.domain].environment
        if not episode.scored:
            return Scored(rollout, text, NOT_SCORED)
        hidden = rollout.finish_reason == "length" and isinstance(environment, GroupEnvironment)  # as in its group
        if isinstance(environment, TurnEnvironment):
            raise ValueError(f"domain {episode.domain}: its episodes have turns, and this stage plays single-turn ones")
        outcome = await environment.step(episode.row, episode.messages, "" if hidden else text)
        if isinstance(outcome, Observation):
            raise ValueError(
                f"domain {episode.domain}: its environment asks for another turn, and this stage plays single-turn "
                "episodes; use a single-turn environment here"
            )
        return Scored(rollout, text, outcome)

    def _text(self, episode: Episode, rollout: Rollout) -> str:
        return episode.opening + self._tokenizer.decode(rollout.answer)

    def close(self) -> None:
        """Cancel what is under way and close the environments."""
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        for domain in self.domains.values():
            await domain.environment.close()


def undecided(groups: Sequence[Group]) -> str | None:
    """How many verdicts of judges could not be had, in a sentence; None where all could."""
    verdicts, failed, unparsable = _verdicts(groups)
    if not failed + unparsable:
        return None
    lost = (failed + unparsable) / verdicts
    return (
        f"{100 * lost:.1f}% of the judge's verdicts stand undecided ({100 * failed / verdicts:.1f}% unanswered, "
        f"{100 * unparsable / verdicts:.1f}% unparsable)"
    )


def _require_a_verdict(domain: str, groups: Sequence[Group], what: str) -> None:
    """One verdict that could not be had may be bad luck (it is on record with both of its answers); several are not."""
    verdicts, failed, unparsable = _verdicts(groups)
    if verdicts > 2 and failed + unparsable == verdicts:
        raise JudgeError(
            f"{what}: the judge of {domain} decided not one verdict ({100 * failed / verdicts:.0f}% unanswered, "
            f"{100 * unparsable / verdicts:.0f}% unparsable), so the rewards would tell nothing of the answers; "
            f"see that it answers; {WAY_OUT_OF_UNPARSABLE}"
        )


def _verdicts(groups: Sequence[Group]) -> tuple[float, float, float]:
    """Verdicts on record with the answers, and how many of them failed and were unparsable."""
    details = [answer.reward.details for group in groups for answer in group.answers]
    verdicts, failed, unparsable = (
        sum(each.get(name, 0.0) for each in details) for name in ("verdicts", "failed", "unparsable")
    )
    return verdicts, failed, unparsable
