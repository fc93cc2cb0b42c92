"""The choice of experts within groups, as DeepSeek-V3 and its successors define it.

A group counts by the sum of its best two scores. Megatron-Core takes the best (experts of a token) // (groups of a
token) instead, which is two for DeepSeek-V3 itself, so that other proportions would send tokens to other experts.

Legend: T tokens, E experts, K experts of a token.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

SCORES_OF_A_GROUP = 2


def best_in_best_groups(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """scores [T, E] -> the best `topk` scores out of the `group_topk` best groups, and their experts; both [T, K]."""
    groups = scores.view(num_tokens, num_groups, num_experts // num_groups)
    of_group = groups.topk(SCORES_OF_A_GROUP, dim=-1).values.sum(dim=-1)
    chosen = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, of_group.topk(group_topk, dim=-1).indices, True)
    allowed = groups.masked_fill(~chosen[..., None], float("-inf")).view(num_tokens, num_experts)
    return allowed.topk(topk, dim=-1)


def choose_groups_by_their_best_two() -> None:
    """Make Megatron-Core's routers choose groups so. Raises AttributeError for a version that does it elsewhere."""
    if not hasattr(moe_utils, "group_limited_topk"):
        raise AttributeError(
            "megatron-core has no moe_utils.group_limited_topk to replace; install megatron-core>=0.16.1,<0.20"
        )
    moe_utils.group_limited_topk = best_in_best_groups
