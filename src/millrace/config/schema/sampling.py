"""How answers are drawn, and from which prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    temperature: float = 1.0
    """Sampling temperature; trainer log-probs are taken at the same one."""
    top_p: float = 1.0
    """Nucleus sampling threshold."""
    max_response_tokens: int = 1024
    """Longest answer in tokens; an answer that reaches it is overlong. In an episode of many turns: tokens of all its
    turns together."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 0
    """Steps between evaluations inside an RL stage, 0 for none; the start and the end of each stage are measured in any
    case."""
    keep: bool = False
    """Keep a checkpoint at each evaluation inside a stage, so that a teacher rule `best(DOMAIN)` and a gate's way back
    may choose it."""
    samples: int = 1
    """Answers a prompt (avg@k)."""
    max_prompts: int | None = None
    """Only the first so many held-out prompts of each domain."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How held-out answers are sampled."""


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    order: Literal["shuffled", "easy_to_hard"] = "shuffled"
    """Draw the prompts in shuffled epochs, or from the highest pass rate to the lowest. The latter, and the two bounds,
    need the domains' `pass_rates`."""
    above: float | None = None
    """Only prompts whose pass rate is above this; 0 drops what is never solved."""
    below: float | None = None
    """Only prompts whose pass rate is below this; 1 drops what is always solved."""
