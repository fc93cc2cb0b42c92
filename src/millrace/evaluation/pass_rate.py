"""Pass rates with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class PassRate:
    pass_rate: float
    """Mean reward over prompts and answers (avg@k)."""
    half_width: float
    """Half of the 95% confidence interval of the mean over prompts."""
    prompts: int
    answers: int

    def __str__(self) -> str:
        return f"{100 * self.pass_rate:.1f}% ±{100 * self.half_width:.1f}"

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def pass_rate(rewards_P_G: Sequence[Sequence[float]]) -> PassRate:
    """Mean reward of P prompts with G answers each, and its 95% interval.

    Answers to one prompt are not independent, so the interval comes from the spread of the prompts' own means
    (normal approximation, 1.96 standard errors; one prompt has no spread and gets an interval of 1).
    """
    means = [sum(group) / len(group) for group in rewards_P_G]
    p = len(means)
    mean = sum(means) / p
    variance = sum((m - mean) ** 2 for m in means) / (p - 1) if p > 1 else math.inf
    half_width = min(1.0, 1.96 * math.sqrt(variance / p))
    return PassRate(mean, half_width, p, sum(len(group) for group in rewards_P_G))
