"""Episodes of many turns: the policy and an environment take turns until the environment gives a reward or a limit ends
the episode. What comes about is a `TokenStream`.

An episode waits for its own environment alone. One that is stuck or raises ends its own episode, which is masked.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Cut, Reward, Session, TurnEnvironment
from millrace.stages.faults import EnvironmentFault, within
from millrace.stages.groups import Episode, Scored
from millrace.stages.stream import Ask, TokenStream, TurnRules

CLOSE_SECONDS = 30.0
"""Longest wait for a session to close."""

log = logging.getLogger("millrace.stages")


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
            session = await self._open(environment)
        except EnvironmentFault as fault:
            return self._scored(fault.reward(), None)
        try:
            reward, cut = await self._take_turns(session)
        except EnvironmentFault as fault:
            reward, cut = fault.reward(), None
        finally:
            await self._close(session)
        return self._scored(reward, cut)

    async def _open(self, environment: TurnEnvironment) -> Session:
        opening = asyncio.ensure_future(environment.open(self.episode.row))
        try:
            return await within("opening its session", opening, self.rules.limits.open_s)
        except asyncio.CancelledError:
            # It may have come in the same moment: nobody else would give back what it holds.
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                await self._close(opening.result())
            raise

    async def _take_turns(self, session: Session) -> tuple[Reward, Cut | None]:
        limits, stream = self.rules.limits, self._stream
        deadline = asyncio.get_running_loop().time() + limits.episode_s
        while True:
            cut = await stream.generate(deadline)
            if cut is None:
                outcome = await within("a step of its environment", session.step(stream.last_text()), limits.step_s)
                if isinstance(outcome, Reward):
                    return outcome, None
                try:
                    cut = stream.observe(outcome.messages, deadline)
                except DataError as error:
                    raise EnvironmentFault(f"what its environment said cannot be rendered: {error}") from error
            if cut is not None:
                return await within("its environment's score", session.cut(cut), limits.step_s), cut

    async def _close(self, session: Session) -> None:
        try:
            await within("closing its session", session.close(), CLOSE_SECONDS)
        except EnvironmentFault as fault:
            log.warning("%s: %s", self.episode.request_id, fault)

    def _scored(self, reward: Reward, cut: Cut | None) -> Scored:
        rollout = self._stream.rollout(cut)
        return Scored(rollout, self.episode.opening + self.tokenizer.decode(rollout.answer), reward, cut)
