"""The tokens of one conversation as they come about: a prompt, and behind it turns of the policy and its environment.

Tokens in, tokens out: a turn's prompt is the last turn's prompt, with what the engine sampled for it and the
environment's tokens behind it, so that each prompt extends the last one and nothing is tokenised twice. Reasoning of
earlier turns stays where it was sampled, also with a chat template that would drop it once the user speaks again: what
is trained on is what was sampled.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from millrace.config.schema import SamplingConfig, TurnsConfig
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Cut, Message
from millrace.rollout.types import Request, Rollout, SamplingParams
from millrace.stages.groups import Episode

Ask = Callable[[Request], Awaitable[Rollout]]
"""Has the fleet answer a request for one answer."""


@dataclass(frozen=True)
class TurnRules:
    sampling: SamplingConfig
    """Its `max_response_tokens` bounds the tokens of all turns together."""
    limits: TurnsConfig
    context: int
    """Tokens that an engine can hold, prompt and answer together."""


@dataclass
class Spent:
    """What an episode used of its limits so far."""

    turns: int = 0
    sampled: int = 0
    """Tokens that the policy generated."""


@dataclass
class TokenStream:
    episode: Episode
    index: int
    """Which of the answers to the episode's prompt."""
    prompt: tuple[int, ...]
    rules: TurnRules
    tokenizer: ChatTokenizer
    ask: Ask
    spent: Spent = field(default_factory=Spent)
    _answer: list[int] = field(default_factory=list)
    _logp: list[float] = field(default_factory=list)
    _given: list[tuple[int, int]] = field(default_factory=list)
    _version: int = sys.maxsize
    _last: Rollout | None = None
    """The last turn; all of them, each with its prompt, would be too much to keep."""

    async def generate(self, deadline: float) -> Cut | None:
        """The policy's turn; the limit that ended it, or None."""
        sampling, turn = self.rules.sampling, self.spent.turns
        prompt = (*self.prompt, *self._answer)
        room = self.rules.context - len(prompt)
        left = sampling.max_response_tokens - self.spent.sampled
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
        self.spent.turns, self._last = turn + 1, rollout
        self.spent.sampled += len(rollout.answer)
        self._version = min(self._version, rollout.weight_version)
        self._answer += rollout.answer
        self._logp += rollout.rollout_logp
        if rollout.finish_reason == "length":
            return "tokens" if left <= room else "context"
        return None

    def observe(self, messages: Sequence[Message], deadline: float) -> Cut | None:
        """Put the environment's tokens behind the policy's, unless a limit leaves no room for another turn."""
        if cut := self.limit(deadline):
            return cut
        tokens = self._tokens_of(messages)
        begin = len(self._answer)
        if len(self.prompt) + begin + len(tokens) >= self.rules.context:
            return "context"
        self._answer += tokens
        self._logp += [0.0] * len(tokens)
        self._given.append((begin, begin + len(tokens)))
        return None

    def limit(self, deadline: float) -> Cut | None:
        """What forbids another turn as things stand; None where nothing does."""
        if self.spent.turns >= self.rules.limits.most:
            return "turns"
        if asyncio.get_running_loop().time() >= deadline:
            return "time"
        if self.spent.sampled >= self.rules.sampling.max_response_tokens:
            return "tokens"
        return "context" if len(self.prompt) + len(self._answer) >= self.rules.context else None

    def _tokens_of(self, messages: Sequence[Message]) -> list[int]:
        end = self.tokenizer.end_of_turn_id
        # A turn may end with another stop token; then its end stands here, where the policy did not put it.
        ended = [] if self._answer[-1:] == [end] else [end]
        return ended + self.tokenizer.render_observation(messages, thinking=self.episode.thinking)

    @property
    def last(self) -> Rollout:
        """The policy's last turn."""
        assert self._last is not None, "asked for behind a turn"
        return self._last

    def last_text(self) -> str:
        """What the policy wrote in its last turn, with what of it stood in the prompt."""
        return self.tokenizer.answer_opening(self.last.prompt) + self.tokenizer.decode(self.last.answer)

    def rollout(self, cut: Cut | None) -> Rollout:
        """All turns as one answer to the prompt; what the environment said last is left out if no turn came behind."""
        if self._given and self._given[-1][1] == len(self._answer):
            start, _ = self._given.pop()
            del self._answer[start:], self._logp[start:]
        return Rollout(
            request_id=self.episode.request_id,
            index=self.index,
            prompt=self.prompt,
            answer=tuple(self._answer),
            rollout_logp=tuple(self._logp),
            finish_reason="length" if cut in ("tokens", "context") else "stop",
            weight_version=self._version if self._last else 0,
            engine=self._last.engine if self._last else "",
            given=tuple(self._given),
        )


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn, from its episode's alone: the same whatever runs beside it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=4).digest()) >> 1
