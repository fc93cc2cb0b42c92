"""Episodes of many turns: the policy and an environment take turns until the environment gives a reward or a limit ends
the episode. What comes about is a `TokenStream`.

An episode waits for its own environment alone. One that is stuck or raises ends its own episode, which is masked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Cut, Reward, Session, TurnEnvironment
from millrace.stages.groups import Episode, Scored
from millrace.stages.stream import Ask, TokenStream, TurnRules

T = TypeVar("T")

CLOSE_SECONDS = 30.0
"""Longest wait for a session to close."""

log = logging.getLogger("millrace.stages")


class _Fault(Exception):
    """What an environment did wrong, in a few words."""


@dataclass
class TurnEpisode:
    """One answer to an episode's prompt, on its way."""

    episode: Episode
    index: int
    """Which of the answers to the prompt."""
    rules: TurnRules
    tokenizer: ChatTokenizer
    ask: Ask
    _stream: TokenStream = field(init=False)

    def __post_init__(self) -> None:
        self._stream = TokenStream(self.episode, self.index, self.episode.prompt, self.rules, self.tokenizer, self.ask)

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
        limits, stream = self.rules.limits, self._stream
        deadline = asyncio.get_running_loop().time() + limits.episode_s
        while True:
            cut = await stream.generate(deadline)
            if cut is None:
                outcome = await _within("a step of its environment", session.step(stream.last_text()), limits.step_s)
                if isinstance(outcome, Reward):
                    return outcome, None
                cut = stream.observe(outcome.messages, deadline)
            if cut is not None:
                return await _within("its environment's score", session.cut(cut), limits.step_s), cut

    async def _close(self, session: Session) -> None:
        try:
            await _within("closing its session", session.close(), CLOSE_SECONDS)
        except _Fault as fault:
            log.warning("%s: %s", self.episode.request_id, fault)

    def _scored(self, reward: Reward, cut: Cut | None) -> Scored:
        rollout = self._stream.rollout(cut)
        return Scored(rollout, self.episode.opening + self.tokenizer.decode(rollout.answer), reward, cut)


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
