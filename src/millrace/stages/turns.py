"""Episodes of many turns: the policy and an environment take turns until the environment gives a reward or a limit ends
the episode.

Tokens in, tokens out: a turn's prompt is the last turn's prompt, with what the engine sampled for it and the
environment's tokens behind it, so that each prompt extends the last one and nothing is tokenised twice. Reasoning of
earlier turns stays where it was sampled, also with a chat template that would drop it once the user speaks again: what
is trained on is what was sampled.

An episode waits for its own environment alone. One that is stuck or raises ends its own episode, which is masked.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from millrace.config.schema import SamplingConfig, TurnsConfig
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Cut, Observation, Reward, Session, TurnEnvironment
from millrace.rollout.types import Request, Rollout, SamplingParams
from millrace.stages.groups import Episode, Scored

T = TypeVar("T")
Ask = Callable[[Request], Awaitable[Rollout]]
"""Has the fleet answer a request for one answer."""

CLOSE_SECONDS = 30.0
"""Longest wait for a session to close."""

log = logging.getLogger("millrace.stages")


class _Fault(Exception):
    """What an environment did wrong, in a few words."""


@dataclass(frozen=True)
class TurnRules:
    sampling: SamplingConfig
    """Its `max_response_tokens` bounds the tokens of all turns together."""
    limits: TurnsConfig
    context: int
    """Tokens that an engine can hold, prompt and answer together."""


@dataclass
class TurnEpisode:
    """One answer to an episode's prompt, on its way."""

    episode: Episode
    index: int
    """Which of the answers to the prompt."""
    rules: TurnRules
    tokenizer: ChatTokenizer
    ask: Ask
    _answer: list[int] = field(default_factory=list)
    _logp: list[float] = field(default_factory=list)
    _given: list[tuple[int, int]] = field(default_factory=list)
    _turns: int = 0
    _sampled: int = 0
    """Tokens that the policy generated so far."""
    _version: int = sys.maxsize
    _last: Rollout | None = None
    """The last turn; all of them, each with its prompt, would be too much to keep."""

    async def play(self, environment: TurnEnvironment) -> Scored:
        """To its end. What the environment does wrong is a masked reward; raises what the fleet raises."""
        try:
            session = await _within("opening its session", environment.open(self.episode.row), self.rules.limits.open_s)
        except _Fault as fault:
            return self._scored(_masked(fault), None)
        try:
            reward, cut = await self._take_turns(session)
        except _Fault as fault:
            reward, cut = _masked(fault), None
        finally:
            await self._close(session)
        return self._scored(reward, cut)

    async def _take_turns(self, session: Session) -> tuple[Reward, Cut | None]:
        limits = self.rules.limits
        deadline = asyncio.get_running_loop().time() + limits.episode_s
        while True:
            cut = await self._generate(deadline)
            if cut is None:
                outcome = await _within("a step of its environment", session.step(self._last_text()), limits.step_s)
                if isinstance(outcome, Reward):
                    return outcome, None
                cut = self._observe(outcome, deadline)
            if cut is not None:
                return await _within("its environment's score", session.cut(cut), limits.step_s), cut

    async def _generate(self, deadline: float) -> Cut | None:
        """The policy's turn; the limit that ended it, or None."""
        sampling, turn = self.rules.sampling, self._turns
        prompt = (*self.episode.prompt, *self._answer)
        room = self.rules.context - len(prompt)
        left = sampling.max_response_tokens - self._sampled
        left = min(left, self.rules.limits.turn_tokens or left)
        request = Request(
            f"{self.episode.request_id}/{self.index}/{turn}",
            prompt,
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=min(left, room),
                stop_token_ids=self.tokenizer.stop_token_ids,
                seed=turn_seed(self.episode.seed + self.index, turn),
            ),
        )
        try:
            async with asyncio.timeout_at(deadline):
                rollout = await self.ask(request)
        except TimeoutError:
            return "time"
        self._turns, self._last = turn + 1, rollout
        self._sampled += len(rollout.answer)
        self._version = min(self._version, rollout.weight_version)
        self._answer += rollout.answer
        self._logp += rollout.rollout_logp
        if rollout.finish_reason == "length":
            return "tokens" if left <= room else "context"
        return None

    def _observe(self, observation: Observation, deadline: float) -> Cut | None:
        """Put the environment's tokens behind the policy's, unless a limit leaves no room for another turn."""
        if self._turns >= self.rules.limits.most:
            return "turns"
        if asyncio.get_running_loop().time() >= deadline:
            return "time"
        if self._sampled >= self.rules.sampling.max_response_tokens:
            return "tokens"
        tokens = self._tokens_of(observation)
        begin = len(self._answer)
        if len(self.episode.prompt) + begin + len(tokens) >= self.rules.context:
            return "context"
        self._answer += tokens
        self._logp += [0.0] * len(tokens)
        self._given.append((begin, begin + len(tokens)))
        return None

    def _tokens_of(self, observation: Observation) -> list[int]:
        end = self.tokenizer.end_of_turn_id
        # A turn may end with another stop token; then its end stands here, where the policy did not put it.
        ended = [] if self._answer[-1:] == [end] else [end]
        return ended + self.tokenizer.render_observation(observation.messages, thinking=self.episode.thinking)

    def _last_text(self) -> str:
        """What the policy wrote in its last turn, with what of it stood in the prompt."""
        assert self._last is not None, "called behind a turn"
        return self.tokenizer.answer_opening(self._last.prompt) + self.tokenizer.decode(self._last.answer)

    async def _close(self, session: Session) -> None:
        try:
            await _within("closing its session", session.close(), CLOSE_SECONDS)
        except _Fault as fault:
            log.warning("%s: %s", self.episode.request_id, fault)

    def _scored(self, reward: Reward, cut: Cut | None) -> Scored:
        if self._given and self._given[-1][1] == len(self._answer):  # no turn came behind it
            start, _ = self._given.pop()
            del self._answer[start:], self._logp[start:]
        rollout = Rollout(
            request_id=self.episode.request_id,
            index=self.index,
            prompt=self.episode.prompt,
            answer=tuple(self._answer),
            rollout_logp=tuple(self._logp),
            finish_reason="length" if cut in ("tokens", "context") else "stop",
            weight_version=self._version if self._last else 0,
            engine=self._last.engine if self._last else "",
            given=tuple(self._given),
        )
        return Scored(rollout, self.episode.opening + self.tokenizer.decode(rollout.answer), reward, cut)


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn, from its episode's alone: the same whatever runs beside it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=4).digest()) >> 1


def _masked(fault: _Fault) -> Reward:
    return Reward(0.0, str(fault), masked=True)


async def _within(what: str, call: Coroutine[Any, Any, T], seconds: float) -> T:
    """What an environment returns within so many seconds. One that does not even end when it is cancelled is left
    behind. Raises _Fault for all that it does wrong."""
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise _Fault(f"{what} took longer than {seconds:g} s")
        if task.cancelled():
            raise _Fault(f"{what} was cancelled from inside")
    finally:
        task.cancel()
    error = task.exception()
    if isinstance(error, Exception):  # an environment's defect is its episode's, not the run's
        log.warning("%s failed", what, exc_info=error)
        raise _Fault(f"{what} failed: {type(error).__name__}: {error}") from error
    return task.result()
