"""Per-token policy-gradient losses, to be minimised as sum(weight * loss).

Legend: T tokens; A_t advantage; r_t = pi(t) / pi_old(t), pi_old the policy before the batch's first update.

    REINFORCE   -A_t pi(t) / sg[pi(t)]                              gradient -A_t grad log pi(t)
    PPO clip    max(-A_t r_t, -A_t clip(r_t, 1 - low, 1 + high))    arXiv 1707.06347; clip-higher: DAPO, 2503.14476
    CISPO       -sg[clip(r_t, 1 - low, 1 + high)] A_t log pi(t)     MiniMax-M1, arXiv 2506.13585
    GSPO        max(-A_t s_i, -A_t clip(s_i, 1 - low, 1 + high))    arXiv 2507.18071
                s_i = exp(mean over the tokens t of sequence i of log r_t)

Strictly on-policy, r_t is 1 in value, and all four have REINFORCE's gradient. Advantages are constants. Each function
returns the loss [T] and, as a bool [T], the tokens whose ratio is clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.algorithms.segments import segment_mean


def reinforce(logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """-A_t at value; no ratio, so nothing is clipped."""
    return -advantage * torch.exp(logp - logp.detach()), torch.zeros_like(logp, dtype=torch.bool)


def ppo_clip(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic clip, with unequal bounds for clip-higher."""
    return _clipped_surrogate(torch.exp(logp - old_logp), advantage, clip_low, clip_high)


def cispo(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped ratio is only a weight: a clipped token keeps its gradient."""
    ratio = torch.exp(logp.detach() - old_logp)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -clipped * advantage * logp, clipped != ratio


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    segment_ids: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ratio of a whole sequence, its length taken out by the geometric mean over its `mask` > 0 tokens."""
    ratio = torch.exp(segment_mean(logp - old_logp, mask, segment_ids))
    return _clipped_surrogate(ratio, advantage, clip_low, clip_high)


def _clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1.0 - low, 1.0 + high)
    return torch.maximum(free, bounded), bounded.detach() > free.detach()
