"""Correction for tokens that were sampled by another policy than the one that is trained.

The engine that samples and the trainer round differently, and with several updates or stale rollouts the weights differ
too. With r_t = pi_train(t) / pi_rollout(t), the per-token weight is

    none            1
    tis             min(r_t, high)                      truncated importance sampling (Yao et al., "Your efficient RL
                                                        framework secretly brings you off-policy RL training", 2025)
    icepop          r_t if low <= r_t <= high else 0    IcePop (Ling Team, arXiv 2510.18855), and the gate of
                                                        multi-domain on-policy distillation (arXiv 2603.19220, eq. 3)
    sequence_mask   1 if low <= g_i <= high else 0      g_i = exp(mean over sequence i of log r_t)

A sequence is judged by its geometric mean and not by the product of its ratios, as the field does (NeMo-RL, verl): the
product of a thousand tokens leaves any band by rounding alone. Weights are constants: no gradient flows through them. A
token that gets weight 0 still counts in the denominator, which stands in the `weight` stream.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from millrace.algorithms.segments import segment_mean

Correction = Literal["none", "tis", "icepop", "sequence_mask"]


@torch.no_grad()
def correction(
    train_logp: Tensor,
    rollout_logp: Tensor,
    kind: Correction,
    *,
    low: float,
    high: float,
    segment_ids: Tensor,
    mask: Tensor,
) -> Tensor:
    """Weight [T] of each token of the mask; 0 outside the mask.

    Args:
        train_logp, rollout_logp: [T], of the trainer before the update and of the engine that sampled.
        low, high: the band of ratios; `tis` uses `high` alone.
        segment_ids: [T], the sequence of each token.
        mask: [T], above 0 where the policy sampled the token.
    """
    inside = mask > 0
    log_ratio = torch.where(inside, train_logp - rollout_logp, 0.0)
    if kind == "none":
        weight = torch.ones_like(log_ratio)
    elif kind == "tis":
        weight = torch.exp(log_ratio).clamp(max=high)
    elif kind == "icepop":
        ratio = torch.exp(log_ratio)
        weight = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    else:
        ratio = torch.exp(segment_mean(log_ratio, inside, segment_ids))
        weight = ((ratio >= low) & (ratio <= high)).to(log_ratio.dtype)
    return torch.where(inside, weight, 0.0)
