"""Group-relative advantages of GRPO and its variants.

    mean baseline:   A_i = (r_i - mean(r_1..r_G)) / (std(r_1..r_G) + eps)
    leave one out:   A_i = (r_i - mean(r_j, j != i)) / (std(r_j, j != i) + eps)

GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1; as used by Nemotron-Cascade 2, arXiv 2603.19220, equation 1. Leave
one out: RLOO, arXiv 2402.14740; the scale over the other answers is NeMo-RL's. Without the division: Dr. GRPO,
arXiv 2503.20783.

`std` is the sample standard deviation (divided by G - 1). The papers print "std" alone; the framework that the Cascade
runs used takes the sample one, and a group is a sample of the policy's answers. The two differ by the constant factor
sqrt(G / (G - 1)), that is by a learning rate.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_advantages(
    rewards_PG: Tensor,
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
) -> Tensor:
    """Advantages [P, G] of the rewards [P, G] of P prompts with G answers each.

    A group whose rewards are all equal gets exactly 0. Where only the other answers of a leave-one-out group are all
    equal, the difference is not divided.

    Raises:
        ValueError: rewards are not [P, G] with G >= 2.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards_PG.shape)}, expected [prompts, answers] with answers >= 2")
    if baseline == "mean":
        mean_PG = rewards_PG.mean(dim=1, keepdim=True)
        std_PG = rewards_PG.std(dim=1, keepdim=True)
    else:
        mean_PG, std_PG = _others_mean_std(rewards_PG)
    advantages_PG = rewards_PG - mean_PG
    if scale == "std":
        # Rounding leaves a tiny std where all rewards are equal: such a one must not be divided by.
        divisible = std_PG > 1e-6 * rewards_PG.abs().amax(dim=1, keepdim=True)
        advantages_PG = torch.where(divisible, advantages_PG / (std_PG + eps), advantages_PG)
    all_equal = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    return advantages_PG.masked_fill(all_equal, 0.0)


def _others_mean_std(rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation of the other answers of the group, each [P, G]."""
    groups, size = rewards_PG.shape
    others = rewards_PG.unsqueeze(1).expand(groups, size, size)
    off_diagonal = ~torch.eye(size, dtype=torch.bool, device=rewards_PG.device)
    others_PGO = others[:, off_diagonal].view(groups, size, size - 1)
    mean_PG = others_PGO.mean(dim=2)
    if size == 2:  # one other answer: no deviation to speak of
        return mean_PG, torch.zeros_like(mean_PG)
    return mean_PG, others_PGO.std(dim=2)
