"""What goes to a fleet and what comes back: token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SamplingParams:
    n: int = 1
    """Answers a prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """Answer k of the prompt is drawn with seed + k, whatever else runs beside it."""


@dataclass(frozen=True)
class Request:
    id: str
    prompt: tuple[int, ...]
    """Token ids of the prompt; never re-tokenised."""
    sampling: SamplingParams


@dataclass(frozen=True)
class Rollout:
    """An answer, or an episode of many turns: then `answer` goes on through all of them."""

    request_id: str
    index: int
    """Which of the request's n answers."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Token ids behind the prompt: those that the engine sampled, stop tokens included, and between the turns those of
    the environment."""
    rollout_logp: tuple[float, ...]
    """Log-prob of each sampled token in the engine, at the sampling temperature; 0 at the environment's."""
    finish_reason: Literal["stop", "length"]
    """Whether the policy ended the answer, or a limit of tokens did."""
    weight_version: int
    """The oldest weights that a token was sampled with."""
    engine: str
    """Base URL of the engine that answered last."""
    given: tuple[tuple[int, int], ...] = ()
    """Where in `answer` the environment's tokens stand, [start, end) of each stretch, in order."""

    def generated(self) -> list[bool]:
        """Of each token of `answer` whether the policy generated it."""
        mask = [True] * len(self.answer)
        for start, end in self.given:
            mask[start:end] = [False] * (end - start)
        return mask

    def spans(self) -> Iterator[tuple[int, int]]:
        """The stretches [start, end) of `answer` that the policy generated: its turns, in order."""
        begin = 0
        for start, end in self.given:
            yield begin, start
            begin = end
        yield begin, len(self.answer)

    @property
    def length(self) -> int:
        """Tokens that the policy generated."""
        return len(self.answer) - sum(end - start for start, end in self.given)

    @property
    def turns(self) -> int:
        return len(self.given) + 1
