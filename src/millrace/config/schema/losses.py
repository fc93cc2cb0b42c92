"""What a stage makes of rewards and log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from each reward: the group's mean, or the mean of the others."""
    scale: Literal["std", "none"] = "std"
    """Divide by the group's standard deviation (GRPO), or not (Dr. GRPO)."""


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    kind: Literal["reinforce", "ppo", "cispo", "gspo"] = "reinforce"
    """Strictly on-policy REINFORCE, PPO's clip (clip-higher with unequal bounds), CISPO, or GSPO."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high are clipped."""
    aggregation: Literal["token", "sequence"] = "token"
    """Mean over all tokens of the global batch, or mean over sequences of their token means."""


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig:
    kind: Literal["none", "tis", "icepop", "sequence_mask"] = "none"
    """Correction for train/inference mismatch: truncated importance sampling, IcePop's gate, or sequence masks."""
    low: float = 0.5
    """Lowest train/rollout ratio that keeps its weight (icepop, sequence_mask)."""
    high: float = 2.0
    """Highest ratio (icepop, sequence_mask), or where it is truncated (tis)."""


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    coefficient: float = 0.0
    """Weight of the KL term to the stage's starting point; 0 builds no reference model."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator."""


@dataclass(frozen=True, kw_only=True)
class MismatchConfig:
    stop_above: float | None = 0.5
    """Stop the stage when the mean |log p_train - log p_rollout| of a batch exceeds this; null never stops."""
    mask_above: float | None = None
    """Tokens whose |log p_train - log p_rollout| exceeds this get weight 0 (still counted in the denominator)."""
