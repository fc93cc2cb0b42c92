"""What goes to a fleet and what comes back: token ids in, token ids and log-probs out."""

from __future__ import annotations

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
    request_id: str
    index: int
    """Which of the request's n answers."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Token ids that the engine sampled, the stop token included."""
    rollout_logp: tuple[float, ...]
    """Log-prob of each answer token in the engine, at the sampling temperature."""
    finish_reason: Literal["stop", "length"]
    weight_version: int
    engine: str
    """Base URL of the engine that answered."""
