"""From the global batch to the packed micro-batches of one data-parallel rank.

Every rank computes the same cut from the lengths alone. Legend: N tokens of the global batch, T tokens of a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from millrace.data.batch import TokenBatch
from millrace.data.packing import pack, split_balanced


@dataclass(frozen=True)
class MicroBatch:
    """Sequences behind one another, then padding as a sequence of its own."""

    tokens: Tensor
    """int64 [T], padding included"""
    lengths: tuple[int, ...]
    """of the sequences, padding included; they sum to T"""
    real: int
    """The first so many tokens are not padding."""
    positions: Tensor
    """int64 [real]: where the tokens stand in the global batch"""
    streams: Mapping[str, Tensor]
    """float32 [max(real, 1)] each; an empty micro-batch shows one token with nothing but zeros"""
    index: int = 0
    """Its place among the micro-batches of its rank"""

    @property
    def shown(self) -> int:
        """Tokens that the loss sees."""
        return max(self.real, 1)

    @property
    def segment_ids(self) -> Tensor:
        """int64 [shown]: the micro-batch's sequence of each token"""
        lengths = torch.tensor(self.lengths, device=self.tokens.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.tokens.device), lengths)[
            : self.shown
        ]

    @property
    def predicting_rows(self) -> Tensor:
        """int64: tokens followed by a token of the same sequence; the log-prob of that next token is taken there."""
        segment_ids = self.segment_ids[: self.real]
        return (segment_ids[1:] == segment_ids[:-1]).nonzero()[:, 0]

    @property
    def trained_rows(self) -> Tensor:
        """int64: those of `predicting_rows` whose next token has a weight; the others need no logits"""
        rows = self.predicting_rows
        return rows[self.streams["weight"][rows + 1] != 0]

    def taught_rows(self, teacher: int) -> Tensor:
        """int64: those of `trained_rows` whose next token the `teacher`-th teacher speaks about (stream `taught`)"""
        rows = self.trained_rows
        return rows[self.streams["taught"][rows + 1] == teacher]

    def packed_seq_params(self) -> PackedSeqParams:
        bounds = torch.tensor([0, *self.lengths], device=self.tokens.device).cumsum(0).to(torch.int32)
        longest = max(self.lengths)
        return PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        )


def cut_batch(
    batch: TokenBatch,
    *,
    dp: int,
    dp_rank: int,
    capacity: int,
    multiple: int,
    device: torch.device,
    keep: Tensor | None = None,
) -> list[MicroBatch]:
    """The micro-batches of one data-parallel rank: at most `capacity` tokens each, T a multiple of `multiple`.

    All ranks get the same number of them. A rank with fewer sequences gets empty ones at its end: padding that no loss
    sees. `keep`, bool [B], leaves sequences out after the cut: the others stand in the micro-batch and in the order in
    which they stand in the whole batch's. Raises DataError for a sequence longer than `capacity`.
    """
    lengths = batch.lengths.tolist()
    bins_of_rank = []
    for members in split_balanced(lengths, dp):
        bins = pack([lengths[i] for i in members], capacity)
        bins_of_rank.append([[members[i] for i in indices] for indices in bins])
    number = max(len(bins) for bins in bins_of_rank)
    mine = bins_of_rank[dp_rank] + [[]] * (number - len(bins_of_rank[dp_rank]))
    if keep is not None:
        mine = [[i for i in indices if keep[i]] for indices in mine]
    return [make_micro_batch(batch, indices, multiple, device, index) for index, indices in enumerate(mine)]


def make_micro_batch(
    batch: TokenBatch, indices: Sequence[int], multiple: int, device: torch.device, index: int = 0
) -> MicroBatch:
    """The given sequences of the batch, padded to a multiple of `multiple` tokens."""
    positions = batch.positions(indices)
    real = positions.numel()
    padding = max(-real % multiple, multiple if real == 0 else 0)
    lengths = [int(batch.lengths[i]) for i in indices] + ([padding] if padding else [])
    streams = {name: values[positions] if real else values.new_zeros(1) for name, values in batch.streams.items()}
    return MicroBatch(
        tokens=torch.cat([batch.tokens[positions], batch.tokens.new_zeros(padding)]).to(device),
        lengths=tuple(lengths),
        real=real,
        positions=positions,
        streams={name: values.to(device) for name, values in streams.items()},
        index=index,
    )
