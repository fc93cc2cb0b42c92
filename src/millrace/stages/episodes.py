"""Episodes: prompts to the fleet, answers to the environments, rewards back.

Rank 0 plays; the other ranks follow it, because an engine that was lost and restarted is given its weights by all of
them. Answers of a single turn are sampled in one batch and then scored; episodes of many turns are played beside them
(`turns`), each with its environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from millrace.config.schema import SamplingConfig
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import (
    AgentEnvironment,
    Comparison,
    GroupEnvironment,
    ReportingEnvironment,
    TurnEnvironment,
)
from millrace.observe.console import RunConsole
from millrace.rollout.fleet import Fleet, follow
from millrace.rollout.member import FleetNeedsSync
from millrace.rollout.types import Request, Rollout, SamplingParams
from millrace.stages.agents import AgentEpisode
from millrace.stages.chat_endpoint import ChatEndpoint
from millrace.stages.control import Control
from millrace.stages.domains import Domain
from millrace.stages.groups import NOT_SCORED, Episode, Group, Scored
from millrace.stages.stream import TurnRules
from millrace.stages.turns import TurnEpisode
from millrace.stages.verdicts import masked, require_a_verdict, require_unmasked, undecided

T = TypeVar("T")

WAIT_LOG_SECONDS = 10.0
CLOSE_SECONDS = 30.0
"""How long the player waits at its end for what does not stop when it is cancelled."""


@dataclass(frozen=True)
class Play:
    """What is to be played: every episode answered n times and scored."""

    episodes: Sequence[Episode]
    """Rank 0's; elsewhere empty."""
    sampling: SamplingConfig
    n: int
    what: str
    """Names the wait on the progress bar."""
    comparison: Comparison | None = None
    """With one the answers of a group are compared where their domain can; else each is scored alone."""

    @property
    def single(self) -> list[Episode]:
        return [episode for episode in self.episodes if not episode.turns]

    @property
    def with_turns(self) -> list[tuple[Episode, int]]:
        """Each answer to be played, by its episode and its number."""
        return [(episode, index) for episode in self.episodes if episode.turns for index in range(self.n)]


@dataclass
class _Answers:
    """What came back so far."""

    rollouts: list[list[Rollout]]
    """Of the single-turn episodes, in their order."""
    played: dict[tuple[str, int], Scored]
    """Episodes of many turns, by request and number."""


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

    def play(self, play: Play) -> list[Group]:
        """Answer each episode and score the answers. Collective; rank 0 gets the groups, the others nothing.

        When all engines were lost, what came back is kept, and episodes of many turns that were not at their end start
        again after the sync. Raises Stopped on every rank when the run is asked to stop meanwhile.
        """
        answers, groups = _Answers([], {}), list[Group]()
        while not self._control.on_main_until_stopped(lambda: self._try_to_answer(play, answers)):
            self._resync()
        self._control.on_main_until_stopped(lambda: groups.extend(self._groups(play, answers)))
        return groups

    def play_alone(self, play: Play) -> list[Group]:
        """Like `play`, by rank 0 in a thread of its own while the ranks train; nothing else is played meanwhile.

        Raises FleetNeedsSync when all engines were lost: only the ranks together can give them weights.
        """
        answers = _Answers([], {})
        self._answer(play, answers)
        return self._groups(play, answers)

    def score(
        self,
        episodes: Sequence[Episode],
        rollouts: Sequence[Sequence[Rollout]],
        what: str,
        comparison: Comparison | None = None,
    ) -> list[Group]:
        """Answers of a single turn with their rewards, on rank 0. Ctrl-C cancels what is under way.

        Raises JudgeError when a judge decided not one of several verdicts of a domain: their rewards tell nothing.
        """
        assert self._console is not None
        with self._console.bar(f"{what}: rewards", len(episodes)) as bar:
            tasks = [
                self._score_group(episode, answers, comparison)
                for episode, answers in zip(episodes, rollouts, strict=True)
            ]
            groups = self._run(self._all(tasks, f"{what}: waiting for rewards", "groups", bar.update))
        if sentence := undecided(groups):
            self._console.say(f"{what}: {sentence}")
        for name in self.domains:
            require_a_verdict(name, [group for group in groups if group.episode.domain == name], what)
        return groups

    # ---- answers

    def _try_to_answer(self, play: Play, answers: _Answers) -> bool:
        try:
            self._answer(play, answers)
        except FleetNeedsSync as lost:
            assert self._console is not None
            self._console.say(str(lost))
            return False
        return True

    def _answer(self, play: Play, answers: _Answers) -> None:
        """Sample the single-turn answers, and play the other episodes meanwhile."""
        assert self._fleet is not None and self._console is not None
        asked = [] if answers.rollouts else play.single
        future, progress = self._fleet.submit([self._request(episode, play) for episode in asked])
        try:
            self._play_turns(play, answers.played)
            with self._console.bar(play.what, len(asked) * play.n) as bar:
                follow(future, progress, lambda done, total, tokens: bar.update(done, f"{tokens:,} tokens"))
        finally:
            # It may be at its end when the engines are lost for the episodes of many turns.
            if not future.cancel() and future.exception() is None:
                answers.rollouts += future.result()

    def _request(self, episode: Episode, play: Play) -> Request:
        params = SamplingParams(
            n=play.n,
            temperature=play.sampling.temperature,
            top_p=play.sampling.top_p,
            max_tokens=play.sampling.max_response_tokens,
            stop_token_ids=self._tokenizer.stop_token_ids,
            seed=episode.seed,
        )
        return Request(episode.request_id, episode.prompt, params)

    def _play_turns(self, play: Play, played: dict[tuple[str, int], Scored]) -> None:
        """Play the episodes of many turns that are not `played`, all at one time, each at its own pace."""
        assert self._fleet is not None and self._console is not None
        fleet, tokens = self._fleet, 0
        missing = [each for each in play.with_turns if (each[0].request_id, each[1]) not in played]
        if not missing:
            return

        async def ask(request: Request) -> Rollout:
            nonlocal tokens
            rollout = await asyncio.wrap_future(fleet.submit_turn(request))
            tokens += len(rollout.answer)
            return rollout

        async def one(episode: Episode, index: int, endpoints: Mapping[str, ChatEndpoint]) -> None:
            domain = self.domains[episode.domain]
            environment = domain.environment
            rules = TurnRules(play.sampling, domain.turns, fleet.config.max_model_len)
            if isinstance(environment, AgentEnvironment):
                driven = AgentEpisode(episode, index, rules, self._tokenizer, ask)
                scored = await driven.play(environment, endpoints[episode.domain])
            else:
                assert isinstance(environment, TurnEnvironment)
                scored = await TurnEpisode(episode, index, rules, self._tokenizer, ask).play(environment)
            played[episode.request_id, index] = scored

        async def all_of_them(update: Callable[[int], None]) -> None:
            async with contextlib.AsyncExitStack() as stack:
                endpoints = {
                    name: await stack.enter_async_context(ChatEndpoint(environment.listen, environment.port, name))
                    for name in dict.fromkeys(episode.domain for episode, _ in missing)
                    if isinstance(environment := self.domains[name].environment, AgentEnvironment)
                }
                work = [one(episode, index, endpoints) for episode, index in missing]
                await self._all(work, f"{play.what}: waiting for episodes", "episodes", update)

        with self._console.bar(f"{play.what}: episodes", len(missing)) as bar:
            self._run(all_of_them(lambda done: bar.update(done, f"{tokens:,} tokens")))

    def _groups(self, play: Play, answers: _Answers) -> list[Group]:
        """The groups in the order of the episodes; those of single-turn answers are scored here."""
        assert self._console is not None
        single = play.single
        scored = iter(self.score(single, answers.rollouts, play.what, play.comparison) if single else ())
        groups = [
            Group(episode, tuple(answers.played[episode.request_id, index] for index in range(play.n)))
            if episode.turns
            else next(scored)
            for episode in play.episodes
        ]
        for name in dict.fromkeys(group.episode.domain for group in groups):
            environment = self.domains[name].environment
            if isinstance(environment, ReportingEnvironment):
                self._console.say(f"{play.what}: {name}: {environment.summary()}")
            if sentence := masked(name, groups):
                self._console.say(f"{play.what}: {sentence}")
            require_unmasked(name, groups, play.what)
        return groups

    # ---- in the player's loop

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Ctrl-C cancels the work and waits for its end."""
        task = self._loop.create_task(work)
        try:
            return self._loop.run_until_complete(task)
        except KeyboardInterrupt:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
                self._loop.run_until_complete(task)
            raise

    async def _all(
        self, work: Sequence[Coroutine[Any, Any, T]], what: str, of: str, update: Callable[[int], None]
    ) -> list[T]:
        """The results of all, or what the first one that failed raised; then the others are cancelled. A line every
        ten seconds says how far it is."""
        assert self._console is not None
        tasks = [asyncio.create_task(each) for each in work]
        began, done = time.monotonic(), 0

        def count(_: asyncio.Task[T]) -> None:
            nonlocal done
            done += 1
            update(done)

        for task in tasks:
            task.add_done_callback(count)
        pending = set(tasks)
        try:
            while pending:
                ended, pending = await asyncio.wait(
                    pending, timeout=WAIT_LOG_SECONDS, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in ended:
                    task.result()
                if pending:
                    seconds = time.monotonic() - began
                    self._console.say(f"{what}, {len(tasks) - len(pending)} of {len(tasks)} {of} in {seconds:.0f} s")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]

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
        assert not isinstance(environment, TurnEnvironment | AgentEnvironment), "scored where they are played"
        hidden = rollout.finish_reason == "length" and isinstance(environment, GroupEnvironment)  # as in its group
        reward = await environment.step(episode.row, episode.messages, "" if hidden else text)
        return Scored(rollout, text, reward)

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
        if under_way:
            await asyncio.wait(under_way, timeout=CLOSE_SECONDS)
        for domain in self.domains.values():
            await domain.environment.close()
