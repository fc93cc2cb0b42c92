"""The log-prob head: hidden states to log-probs of given tokens, over a vocabulary cut over tensor-parallel ranks.

    logp[t] = z[t, y_t] - logsumexp_v z[t, v],    z[t, v] = hidden[t] . weight[v] / temperature

The logits z of a few tokens exist at one time, in the forward as in the backward pass, which computes them anew. Rows
that pad the vocabulary take no part.

Legend: T tokens, H hidden size, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


class VocabularyShard(NamedTuple):
    """Which rows of the vocabulary a rank holds."""

    first: int
    """Token id of the rank's first row."""
    rows: int
    """Rows that are tokens; the rank's remaining rows are padding."""

    @classmethod
    def of_weight(cls, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> VocabularyShard:
        return cls.of_rank(weight.shape[0], vocab_size, 0 if group is None else dist.get_rank(group))

    @classmethod
    def of_rank(cls, rows_per_rank: int, vocab_size: int, rank: int) -> VocabularyShard:
        first = rank * rows_per_rank
        return cls(first, min(max(vocab_size - first, 0), rows_per_rank))


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    chunk: int,
    group: dist.ProcessGroup | None,
    rows: Tensor | None = None,
    sequence_parallel: bool = False,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `targets` [T] (and the entropy of each distribution), in float32 at least, equal on all TP ranks.

    `hidden` is the model's output, [T, H], or with sequence parallelism this rank's [T / TP, H]. `rows` picks the rows
    of the whole [T, H] that `targets` speaks about. Gradients reach `hidden` as Megatron-Core's layers expect them. The
    entropy carries no gradient.
    """
    hidden = whole_hidden(hidden, group, sequence_parallel)
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    logp, entropies = VocabParallelLogProb.apply(
        hidden, weight, targets, temperature, vocab_size, chunk, group, entropy
    )
    return logp, (entropies if entropy else None)


def whole_hidden(hidden: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """The hidden states [T, H] on each tensor-parallel rank, from this rank's [T / TP, H] with sequence parallelism.

    Each rank gives its part of their gradient; the layers below get the sum as Megatron-Core hands it on.
    """
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    if group is not None and dist.get_world_size(group) > 1:
        return copy_to_tensor_model_parallel_region(hidden)
    return hidden


def vocabulary_logits(
    hidden: Tensor, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """All logits [T, V] on every TP rank, without gradient; for small inputs."""
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    local = hidden @ weight.T
    if group is None or dist.get_world_size(group) == 1:
        return local[:, :vocab_size]
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=1)[:, :vocab_size]


class VocabParallelLogProb(torch.autograd.Function):
    """hidden [T, H], weight [V / TP, H], targets [T] -> logp [T], entropy [T] (empty unless asked for).

    The gradient it gives for `hidden` is this rank's part: the sum over the ranks of the group is the whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        vocab_size: int,
        chunk: int,
        group: dist.ProcessGroup | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        shard = VocabularyShard.of_weight(weight, vocab_size, group)
        dtype = logit_dtype(hidden)
        # Rows: largest logit, sum of exp(z - largest), logit of the target, sum of z exp(z - largest).
        parts = torch.zeros(4, hidden.shape[0], dtype=dtype, device=hidden.device)
        parts[0].fill_(torch.finfo(dtype).min)
        for at, logits in logit_chunks(hidden, weight, shard, temperature, chunk):
            _reduce_chunk(parts[:, at], logits, targets[at] - shard.first, entropy)
        largest, total, target, weighted = _combine(parts, group)
        log_z = largest + total.log()
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.temperature, ctx.shard, ctx.chunk = temperature, shard, chunk
        entropies = log_z - weighted / total if entropy else log_z.new_empty(0)
        ctx.mark_non_differentiable(entropies)
        return target - log_z, entropies

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        gradient = HeadGradient(hidden, weight, shard, ctx.needs_input_grad)
        for at, logits in logit_chunks(hidden, weight, shard, ctx.temperature, ctx.chunk):
            grad_logits = logits.sub_(log_z[at, None]).exp_().mul_(-grad_logp[at, None])
            found, columns = held(targets[at] - shard.first, shard.rows)
            grad_logits[found, columns[found]] += grad_logp[at][found]
            gradient.add(at, grad_logits.div_(ctx.temperature))
        return gradient.of_hidden, gradient.of_weight(), *[None] * 6


class HeadGradient:
    """The gradient of the hidden states and of the head's weight, from those of the logits a chunk at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabularyShard, needed: Sequence[bool]) -> None:
        self._hidden, self._weight, self._rows = hidden, weight, shard.rows
        self.of_hidden = torch.empty_like(hidden) if needed[0] else None
        # Chunks add up in full precision; a bfloat16 sum would lose the small ones.
        self._of_weight = torch.zeros_like(weight, dtype=logit_dtype(hidden)) if needed[1] else None

    def add(self, at: slice, grad_logits: Tensor) -> None:
        """`grad_logits` [C, rows], of the product hidden . weight."""
        grad_logits = grad_logits.to(self._hidden.dtype)
        if self.of_hidden is not None:
            torch.mm(grad_logits, self._weight[: self._rows], out=self.of_hidden[at])
        if self._of_weight is not None:
            self._of_weight[: self._rows] += grad_logits.T @ self._hidden[at]

    def of_weight(self) -> Tensor | None:
        return None if self._of_weight is None else self._of_weight.to(self._weight.dtype)


def logit_dtype(hidden: Tensor) -> torch.dtype:
    """Logits and what is reduced from them are of float32 at least."""
    return torch.promote_types(hidden.dtype, torch.float32)


def logit_chunks(
    hidden: Tensor, weight: Tensor, shard: VocabularyShard, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """This rank's logits [C, rows], a chunk of tokens at a time."""
    rows = weight[: shard.rows].T
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, min(start + chunk, hidden.shape[0]))
        logits = (hidden[at] @ rows).to(logit_dtype(hidden))
        yield at, logits.div_(temperature) if temperature != 1.0 else logits


def held(columns: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which targets this rank holds, and all columns brought into its range."""
    found = (columns >= 0) & (columns < rows)
    return found, torch.where(found, columns, 0)


def _reduce_chunk(parts: Tensor, logits: Tensor, columns: Tensor, entropy: bool) -> None:
    if logits.shape[1] == 0:  # nothing but padding rows on this rank
        return
    found, columns = held(columns, logits.shape[1])
    parts[0] = logits.amax(dim=1)
    parts[2] = logits.gather(1, columns[:, None])[:, 0] * found
    if entropy:
        exponentials = (logits - parts[0, :, None]).exp_()
        parts[3] = (exponentials * logits).sum(dim=1)
    else:
        exponentials = logits.sub_(parts[0, :, None]).exp_()
    parts[1] = exponentials.sum(dim=1)


def _combine(parts: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put the ranks' parts together: two all-reduces for a whole micro-batch."""
    if group is None or dist.get_world_size(group) == 1:
        return parts[0], parts[1], parts[2], parts[3]
    largest = parts[0].clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    scale = (parts[0] - largest).exp()
    sums = torch.stack([parts[1] * scale, parts[2], parts[3] * scale])
    dist.all_reduce(sums, group=group)
    return largest, sums[0], sums[1], sums[2]
