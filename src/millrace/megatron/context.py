"""Context parallelism: which tokens of a packed micro-batch a rank computes, and what ranks tell each other.

Legend: T tokens of a micro-batch, padding included, CP ranks that share each of its sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


@dataclass(frozen=True)
class ContextShare:
    """Which part of every sequence a context-parallel rank computes.

    A sequence is padded to a multiple of 2 CP tokens and cut into 2 CP chunks; rank r takes the chunks r and
    2 CP - 1 - r, so that causal attention costs all ranks the same. Transformer Engine and the rotary embeddings of
    Megatron-Core take this cut for granted.
    """

    ranks: int = 1
    rank: int = 0

    @property
    def multiple(self) -> int:
        """Tokens to a multiple of which each sequence is padded."""
        return 2 * self.ranks if self.ranks > 1 else 1

    def rows(self, lengths: Sequence[int]) -> Tensor:
        """int64 [T / CP]: the rows of the packed sequences of these padded lengths that the rank computes, in its
        order."""
        starts = itertools.accumulate(lengths, initial=0)
        return torch.cat([self._rows_of_one(first, n) for first, n in zip(starts, lengths, strict=False)])

    def _rows_of_one(self, first: int, length: int) -> Tensor:
        if self.ranks == 1:
            return torch.arange(first, first + length)
        chunk = length // (2 * self.ranks)
        head, tail = first + self.rank * chunk, first + length - (self.rank + 1) * chunk
        return torch.cat([torch.arange(head, head + chunk), torch.arange(tail, tail + chunk)])


ALONE = ContextShare()
"""No other rank shares the sequences."""


def whole_sequences(local: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The packed tokens [T, ...] of all ranks in their order, from this rank's [T / CP, ...].

    `lengths` are the padded ones of the sequences. In the backward pass each rank gets the sum over all ranks of its
    own tokens' gradient.
    """
    gathered = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=group)
    rows = torch.cat([ContextShare(group.size(), rank).rows(lengths) for rank in range(group.size())])
    return gathered.index_select(0, rows.argsort().to(local.device))


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of values [T] that each rank has of its own tokens, and zeros of the others.

    The gradient of the sum is the gradient of what this rank gave: every rank takes the same loss of it.
    """
    if group is None or group.size() == 1:
        return values
    return reduce_from_tensor_model_parallel_region(values.contiguous(), group)
