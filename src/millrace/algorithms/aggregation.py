"""From per-token losses to one number: the weight of each token in the sum.

    token      w_t = m_t / sum_t m_t    every token of the global batch counts the same (DAPO, arXiv 2503.14476)
    sequence   w_t = m_t / (n_i * S)    every sequence counts the same: n_i = tokens of sequence i in the mask,
                                        S = sequences with at least one (GRPO, arXiv 2402.03300)

The denominators are those of the global batch and stand inside the weights, so that a gradient does not depend on how
the batch is cut into micro-batches or over ranks: every piece adds sum(weight * loss), and nothing is divided again.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def token_weights(
    mask: Tensor, lengths: Tensor, kind: Literal["token", "sequence"] = "token", *, denominator: float | None = None
) -> Tensor:
    """Weights float32 [N] of the tokens of a global batch; they sum to 1.

    Args:
        mask: [N], 1 where a token is trained on, else 0.
        lengths: [B], tokens of each sequence, summing to N.
        kind: see the module's docstring.
        denominator: tokens (sequences) of the global batch where `mask` is only a part of it; those of the mask itself
            when absent.

    An empty mask gives weight 0 everywhere, an update without a gradient.
    """
    mask = mask.to(torch.float64)  # counts stay exact
    if kind == "token":
        counted = mask.sum() if denominator is None else mask.new_tensor(denominator)
        return (mask / counted.clamp(min=1.0)).float()
    sequences = torch.arange(lengths.numel(), device=mask.device).repeat_interleave(lengths.to(mask.device))
    tokens = mask.new_zeros(lengths.numel()).index_add(0, sequences, mask)
    counted = (tokens > 0).sum() if denominator is None else mask.new_tensor(denominator)
    return (mask / (tokens.clamp(min=1.0)[sequences] * counted.clamp(min=1))).float()
