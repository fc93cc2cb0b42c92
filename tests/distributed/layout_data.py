"""The batch and the loss that the layout tests run on every rank and in transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from millrace.data.batch import TokenBatch

LENGTHS = (5, 17, 9, 30, 12, 24, 2, 1)
VOCABULARY = 320


def example_batch() -> TokenBatch:
    """Sequences of unequal length; the weights have either sign."""
    generator = torch.Generator().manual_seed(7)
    tokens = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    weight = torch.randn(sum(LENGTHS), generator=generator) / sum(LENGTHS)
    return TokenBatch.from_sequences(tokens).with_streams(weight=weight)


def example_tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


def negative_log_likelihood(
    logp: Tensor, streams: Mapping[str, Tensor], segment_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    loss = -(streams["weight"] * logp).sum()
    return loss, {"weight": streams["weight"].sum()}
