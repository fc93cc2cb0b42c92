"""From the global batch to the packed micro-batches of one data-parallel rank, and to a context-parallel rank's share.

Every rank computes the same cut from the lengths alone. Legend: N tokens of the global batch, T tokens of a
micro-batch, padding included, CP ranks that share each of its sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from millrace.data.batch import TokenBatch
from millrace.data.packing import pack, split_balanced
from millrace.megatron.context import ALONE, ContextShare, sum_over_ranks

COUNTS_TOKENS = "total_tokens" in {field.name for field in fields(PackedSeqParams)}


@dataclass(frozen=True)
class MicroBatch:
    """Sequences behind one another: as the loss sees them, whole and without padding, and what this rank's model
    computes of them.

    The model sees each sequence with the padding that context parallelism needs at its end, then more padding as
    sequences of their own, which repeat the real ones from the first on. So their activations are some that are there
    already, and change no scale of FP8, which comes from the largest.
    """

    tokens: Tensor
    """int64 [shown]: the whole sequences, without padding"""
    lengths: tuple[int, ...]
    """of the sequences, without padding"""
    positions: Tensor
    """int64 [real]: where the tokens stand in the global batch"""
    streams: Mapping[str, Tensor]
    """float32 [shown] each; an empty micro-batch shows one token with nothing but zeros"""
    input_ids: Tensor
    """int64 [T / CP]: the tokens that this rank's model computes, padding included"""
    padded_lengths: tuple[int, ...]
    """of the sequences as all context-parallel ranks together see them; they sum to T"""
    model_rows: Tensor
    """int64 [shown]: where each token stands in `input_ids`, or -1 if another context-parallel rank computes it"""
    context: ContextShare = ALONE
    index: int = 0
    """Its place among the micro-batches of its rank"""

    @property
    def real(self) -> int:
        """Tokens that stand in the global batch."""
        return self.positions.numel()

    @property
    def shown(self) -> int:
        """Tokens that the loss sees."""
        return max(self.real, 1)

    @property
    def segment_ids(self) -> Tensor:
        """int64 [shown]: the micro-batch's sequence of each token"""
        lengths = torch.tensor(self.lengths or (1,), device=self.tokens.device)
        return torch.repeat_interleave(torch.arange(lengths.numel(), device=self.tokens.device), lengths)

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

    def computed_here(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Those of `rows` that this context-parallel rank computes, and where its hidden states hold them."""
        places = self.model_rows[rows]
        mine = places >= 0
        return rows[mine], places[mine]

    def aligned(self, rows: Tensor, values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """[shown]: the values of `rows` at the tokens that they predict, those of the group's other ranks at theirs, 0
        elsewhere."""
        return sum_over_ranks(values.new_zeros(self.shown).index_copy(0, rows + 1, values), group)

    def packed_seq_params(self) -> PackedSeqParams:
        """What the attention and the rotary embedding need to know: of the whole sequences, also where ranks share
        them. Padding counts as their end, which no earlier token attends to."""
        bounds = torch.tensor([0, *self.padded_lengths], device=self.tokens.device).cumsum(0).to(torch.int32)
        longest = max(self.padded_lengths)
        shared_bounds = bounds if self.context.ranks > 1 else None
        # Since a version behind 0.16 Mamba layers are told here which tokens are of one sequence, but only with their
        # number; without it, sequences would flow into one another.
        counted = {"total_tokens": sum(self.padded_lengths)} if COUNTS_TOKENS else {}
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            cu_seqlens_q_padded=shared_bounds,
            cu_seqlens_kv_padded=shared_bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            **counted,
        )


def cut_batch(
    batch: TokenBatch,
    *,
    dp: int,
    dp_rank: int,
    capacity: int,
    multiple: int,
    device: torch.device,
    context: ContextShare = ALONE,
    keep: Tensor | None = None,
) -> list[MicroBatch]:
    """The micro-batches of one data-parallel rank: at most `capacity` tokens each, without padding.

    All ranks get the same number of them. A rank with fewer sequences gets empty ones at its end: padding that no loss
    sees. `multiple` and `context` as for `make_micro_batch`. `keep`, bool [B], leaves sequences out after the cut: the
    others stand in the micro-batch and in the order in which they stand in the whole batch's. Raises DataError for a
    sequence longer than `capacity`.
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
    return [make_micro_batch(batch, indices, multiple, device, index, context) for index, indices in enumerate(mine)]


def make_micro_batch(
    batch: TokenBatch,
    indices: Sequence[int],
    multiple: int,
    device: torch.device,
    index: int = 0,
    context: ContextShare = ALONE,
) -> MicroBatch:
    """The given sequences of the batch, padded so that each context-parallel rank computes the same number of tokens, a
    multiple of `multiple`."""
    positions = batch.positions(indices)
    lengths = [int(batch.lengths[i]) for i in indices]
    padded = [n + -n % context.multiple for n in lengths]
    whole = math.lcm(context.multiple, context.ranks * multiple)
    padding = -sum(padded) % whole or (0 if padded else whole)
    padded_lengths = padded + repeated(padded, padding)

    starts = itertools.accumulate(padded_lengths, initial=0)
    places = [torch.arange(first, first + n) for first, n in zip(starts, lengths, strict=False)]
    row_of_token = torch.cat(places) if places else torch.zeros(1, dtype=torch.int64)
    tokens = batch.tokens[positions].cpu() if lengths else torch.zeros(1, dtype=torch.int64)
    rows = context.rows(padded_lengths)
    unpadded = torch.zeros(sum(padded) or 1, dtype=torch.int64).index_copy(0, row_of_token, tokens)
    input_ids = unpadded[torch.arange(sum(padded_lengths)) % unpadded.numel()][rows]
    model_rows = torch.full((sum(padded_lengths),), -1).index_copy(0, rows, torch.arange(rows.numel()))[row_of_token]

    streams = {name: values[positions] if lengths else values.new_zeros(1) for name, values in batch.streams.items()}
    return MicroBatch(
        tokens=tokens.to(device),
        lengths=tuple(lengths),
        positions=positions,
        streams={name: values.to(device) for name, values in streams.items()},
        input_ids=input_ids.to(device),
        padded_lengths=tuple(padded_lengths),
        model_rows=model_rows.to(device),
        context=context,
        index=index,
    )


def repeated(lengths: Sequence[int], count: int) -> list[int]:
    """Lengths that add up to `count`: those given, again and again, the last one cut; just `count` where none is."""
    found: list[int] = []
    for length in itertools.cycle(lengths or [count]):
        if count == 0:
            break
        found.append(min(length, count))
        count -= found[-1]
    return found
