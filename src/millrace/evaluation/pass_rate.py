"""Pass rates with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

Z = 1.96
"""Standard errors to either side of a mean that hold 95% of a normal distribution."""


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
    (normal approximation, z = 1.96 standard errors; one prompt has no spread and gets an interval of 1). Means that all
    agree have no spread either and are yet not certain, so the half width is at least that of Wilson's score interval
    at a rate of 0 or 1, which is z^2 / (2 (P + z^2)) (Wilson, Probable inference, the law of succession, and
    statistical inference, JASA 22, 1927).
    """
    means = [sum(group) / len(group) for group in rewards_P_G]
    p = len(means)
    mean = sum(means) / p
    variance = sum((m - mean) ** 2 for m in means) / (p - 1) if p > 1 else math.inf
    least = Z**2 / (2 * (p + Z**2))
    half_width = min(1.0, max(least, Z * math.sqrt(variance / p)))
    return PassRate(mean, half_width, p, sum(len(group) for group in rewards_P_G))
