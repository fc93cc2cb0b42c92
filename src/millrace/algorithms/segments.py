"""Means over the sequences of a packed row of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_mean(values: Tensor, mask: Tensor, segment_ids: Tensor) -> Tensor:
    """The mean of `values` [T] over the masked-in tokens of each token's own sequence, [T].

    A sequence without a masked-in token has mean 0. Gradients flow. The ids may be any integers; a sequence must not be
    cut over several calls.
    """
    ids, where = torch.unique(segment_ids, return_inverse=True)
    mask = mask.to(values.dtype)
    total = values.new_zeros(ids.numel()).index_add(0, where, torch.where(mask > 0, values, 0.0))
    count = values.new_zeros(ids.numel()).index_add(0, where, mask)
    return (total / count.clamp(min=1.0))[where]
