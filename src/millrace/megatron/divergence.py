"""The reverse KL of the policy to its teachers at each token, over a vocabulary cut over tensor-parallel ranks.

    d[t] = sum_{v in S} p[v] (log p[v] - log q[v]) + p_rest (log p_rest - log q_rest)

with p and q the softmax of the student's and the teacher's logits at token t. S is the whole vocabulary, and then there
is no rest, or the student's or the teacher's k likeliest tokens; `algorithms.distillation` says why it is this sum. The
gradient with respect to the student's logits z is, for every v of the vocabulary,

    grad d / grad z[v] = p[v] (c[v] - d),    c[v] = log p[v] - log q[v] in S, log p_rest - log q_rest outside

Neither model's logits are stored. Of a teacher the hidden states of its tokens and its head's weight are kept, and the
logits of both models are computed anew, a few tokens at a time, in the forward as in the backward pass. A micro-batch
costs two all-reduces whatever the number of teachers, and to find S one gather of k logits a token and rank.

Legend: T tokens, H hidden size, V vocabulary, C tokens of one chunk, K candidates of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from millrace.algorithms.distillation import Support
from millrace.megatron.logprobs import (
    HeadGradient,
    VocabParallelLogProb,
    VocabularyShard,
    held,
    logit_chunks,
    logit_dtype,
    whole_hidden,
)
from millrace.megatron.microbatch import MicroBatch


@dataclass(frozen=True)
class TeacherStates:
    """What one teacher knows of one batch, on one rank; made by `Policy.teacher_states`.

    Only a rank at the pipeline's end holds anything, the same on all its tensor-parallel peers but for the head.
    """

    hidden: Sequence[Tensor]
    """[n, H] for each micro-batch of the student on this rank: its tokens that this teacher speaks about"""
    head_weight: Tensor | None
    """[V / TP, H], of a teacher that shares the student's module a copy: its weights leave the device afterwards"""


@dataclass(frozen=True)
class Divergence:
    """What a train step needs to take the stream `divergence` from."""

    teachers: Sequence[TeacherStates]
    """The k-th, counted from 1, speaks about the tokens whose stream `taught` is k."""
    top_k: int | None = None
    """Size of the support; None is the whole vocabulary, which a larger k is as well."""
    support: Support = "student"
    """Whose likeliest tokens the support is."""

    def of(self, micro_batch: MicroBatch) -> list[TeacherRows]:
        """The teachers' parts in one micro-batch. Raises ValueError if the states are those of another batch."""
        found = []
        for number, teacher in enumerate(self.teachers, start=1):
            rows, places = micro_batch.computed_here(micro_batch.taught_rows(number))
            hidden = teacher.hidden[micro_batch.index]
            if rows.numel() != hidden.shape[0]:
                raise ValueError(
                    f"teacher {number} has states of {hidden.shape[0]} tokens for micro-batch {micro_batch.index}, but "
                    f"the batch has {rows.numel()}; take Policy.teacher_states of the batch that is trained on"
                )
            assert teacher.head_weight is not None
            found.append(TeacherRows(rows, places, hidden, teacher.head_weight))
        return found


class TeacherRows(NamedTuple):
    """What a teacher says in one micro-batch."""

    rows: Tensor
    """int64 [n], of the micro-batch"""
    places: Tensor
    """int64 [n], where the student's hidden states hold them"""
    hidden: Tensor
    """[n, H]"""
    head_weight: Tensor
    """[V / TP, H]"""


class TaughtTokens(NamedTuple):
    """Values [shown] of the tokens of a micro-batch; 0 at those that have none."""

    logp: Tensor
    """Without gradient where a teacher speaks."""
    entropy: Tensor | None
    divergence: Tensor


def taught_logprobs(
    hidden: Tensor,
    weight: Tensor,
    micro_batch: MicroBatch,
    divergence: Divergence,
    *,
    temperature: float,
    vocab_size: int,
    chunk: int,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool = False,
    entropy: bool = False,
    context: dist.ProcessGroup | None = None,
) -> TaughtTokens:
    """Log-probs of the trained tokens of a micro-batch, and where a teacher speaks the reverse KL to it.

    `hidden` is the model's output as `logprobs.token_logprobs` takes it. Of each token either the log-prob has a
    gradient or the divergence, so that its logits are taken by one of two functions only. `context` are the ranks that
    share the sequences: all get the values of all tokens. Raises ValueError for teacher states of another batch.
    """
    hidden = whole_hidden(hidden, group, sequence_parallel)
    teachers = divergence.of(micro_batch)
    taught, taught_places = (torch.cat(column) for column in zip(*((t.rows, t.places) for t in teachers), strict=True))
    untaught, places = micro_batch.computed_here(micro_batch.taught_rows(0))
    common = (temperature, vocab_size, chunk, group, entropy)
    parts = []
    if untaught.numel() or not taught.numel():  # an empty micro-batch needs a graph to walk back too
        inputs = hidden.index_select(0, places), weight, micro_batch.tokens[untaught + 1]
        logp, entropies = VocabParallelLogProb.apply(*inputs, *common)
        parts.append((untaught, logp, entropies, torch.zeros_like(logp)))
    if taught.numel():
        inputs = hidden.index_select(0, taught_places), weight, micro_batch.tokens[taught + 1]
        top_k = None if divergence.top_k is None else TopK(min(divergence.top_k, vocab_size), divergence.support)
        parts.append((taught, *VocabParallelReverseKL.apply(*inputs, teachers, top_k, *common)))
    rows, logp, entropies, values = (torch.cat(column) for column in zip(*parts, strict=True))

    def aligned(found: Tensor) -> Tensor:
        return micro_batch.aligned(rows, found, context)

    return TaughtTokens(aligned(logp), aligned(entropies) if entropy else None, aligned(values))


class TopK(NamedTuple):
    """The `size` likeliest tokens of student or teacher."""

    size: int
    of: Support


class VocabParallelReverseKL(torch.autograd.Function):
    """hidden [T, H], weight [V / TP, H], targets [T] -> logp [T], entropy [T] (empty unless asked for), d [T].

    The tokens stand in the order of the teachers, which speak about T tokens together. Only d has a gradient; what it
    gives for `hidden` is this rank's part: the sum over the ranks of the group is the whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teachers: Sequence[TeacherRows],
        top_k: TopK | None,
        temperature: float,
        vocab_size: int,
        chunk: int,
        group: dist.ProcessGroup | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = _Heads(weight, teachers, VocabularyShard.of_weight(weight, vocab_size, group), temperature, chunk)
        part = _ShardSums(hidden, whole_vocabulary=top_k is None)
        candidates = None if top_k is None else _Candidates(top_k, hidden, heads.shard)
        for at, student, teacher in heads.chunks(hidden):
            if candidates is not None:
                candidates.take(at, student, teacher)
            part.take(at, student, teacher, targets[at] - heads.shard.first)
        support = None
        if candidates is not None:
            support = candidates.support(weight.shape[0], group)
            part.keep_to(support, candidates)
        whole = part.over(group)
        divergence = whole.log_ratio + whole.rest * whole.rest_log_ratio
        ctx.save_for_backward(hidden, whole.log_z, whole.log_z_ratio, whole.rest_log_ratio, divergence)
        ctx.heads, ctx.support = heads, support
        logp = whole.target - whole.log_z
        entropies = whole.log_z - whole.logit if entropy else logp.new_empty(0)
        ctx.mark_non_differentiable(logp, entropies)
        return logp, entropies, divergence

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, log_z, log_z_ratio, rest_log_ratio, divergence = ctx.saved_tensors
        heads: _Heads = ctx.heads
        support: _Support | None = ctx.support
        gradient = HeadGradient(hidden, heads.weight, heads.shard, ctx.needs_input_grad)
        scale = grad / heads.temperature
        for at, student, teacher in heads.chunks(hidden):
            log_ratio = teacher.neg_().add_(student).sub_(log_z_ratio[at, None])
            if support is not None:
                support.fill_outside(at, log_ratio, rest_log_ratio[at, None])
            excess = log_ratio.sub_(divergence[at, None]).mul_(scale[at, None])
            gradient.add(at, student.sub_(log_z[at, None]).exp_().mul_(excess))
        return gradient.of_hidden, gradient.of_weight(), *[None] * 8


@dataclass(frozen=True)
class _Heads:
    """The logits of student and teachers over this rank's rows of the vocabulary."""

    weight: Tensor
    """[V / TP, H], the student's"""
    teachers: Sequence[TeacherRows]
    shard: VocabularyShard
    temperature: float
    chunk: int

    def chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The student's and the teacher's logits [C, rows], a chunk of tokens at a time; the caller may change them."""
        first = 0
        for teacher in self.teachers:
            end = first + teacher.hidden.shape[0]
            ours = logit_chunks(hidden[first:end], self.weight, self.shard, self.temperature, self.chunk)
            theirs = logit_chunks(teacher.hidden, teacher.head_weight, self.shard, self.temperature, self.chunk)
            for (at, student), (_, taught) in zip(ours, theirs, strict=True):
                yield slice(first + at.start, first + at.stop), student, taught
            first = end


class _WholeSums(NamedTuple):
    """[T] each, over the whole vocabulary; p and q are the student's and the teacher's probabilities."""

    log_z: Tensor
    """log-sum-exp of the student's logits"""
    log_z_ratio: Tensor
    """the same less the teacher's"""
    log_ratio: Tensor
    """sum over the support of p (log p - log q)"""
    logit: Tensor
    """mean of the student's logits under p"""
    target: Tensor
    """the student's logit of the target"""
    rest: Tensor
    """p outside the support"""
    rest_log_ratio: Tensor
    """log p - log q of all that is outside; 0 where nothing is"""


class _ShardSums:
    """What this rank's rows of the vocabulary add to the sums of T tokens."""

    def __init__(self, hidden: Tensor, whole_vocabulary: bool) -> None:
        tokens, dtype = hidden.shape[0], logit_dtype(hidden)
        self._whole = whole_vocabulary  # and not a support that is known in the end only, see keep_to
        # Log-sum-exps of the student's logits and of the teacher's; with a support also of those outside of it.
        self._logs = torch.full((2, tokens), torch.finfo(dtype).min, dtype=dtype, device=hidden.device)
        # Of student's less teacher's logit in the support, and of the student's logit: sums weighted by the student's
        # softmax over this rank's rows alone.
        self._means = torch.zeros((2, tokens), dtype=dtype, device=hidden.device)
        self._target = torch.zeros(tokens, dtype=dtype, device=hidden.device)

    def take(self, at: slice, student: Tensor, teacher: Tensor, columns: Tensor) -> None:
        """Add up a chunk of logits; the teacher's are overwritten."""
        if student.shape[1] == 0:  # nothing but padding rows on this rank
            return
        found, columns = held(columns, student.shape[1])
        self._target[at] = student.gather(1, columns[:, None])[:, 0] * found
        largest = student.amax(dim=1)
        exponentials = (student - largest[:, None]).exp_()
        total = exponentials.sum(dim=1)
        self._logs[0, at] = largest + total.log()
        self._logs[1, at] = teacher.logsumexp(dim=1)
        if self._whole:
            self._means[0, at] = teacher.neg_().add_(student).mul_(exponentials).sum(dim=1) / total
        self._means[1, at] = exponentials.mul_(student).sum(dim=1) / total

    def keep_to(self, support: _Support, candidates: _Candidates) -> None:
        """Restrict the log ratio to the support, and tell what lies outside."""
        student, teacher = candidates.logits
        p = (student - self._logs[0, :, None]).exp_()
        self._means[0] = (p * support.chosen * (student - teacher)).sum(dim=1)
        self._logs = torch.cat([self._logs, candidates.outside(support)])

    def over(self, group: dist.ProcessGroup | None) -> _WholeSums:
        """Put the ranks' parts together, in two all-reduces."""
        logs, means, target = self._logs, self._means, self._target
        if group is not None and dist.get_world_size(group) > 1:
            largest = logs.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            scale = (logs - largest).exp()
            sums = torch.cat([scale, means * scale[0], target[None]])
            dist.all_reduce(sums, group=group)
            totals, means, target = sums[: len(logs)], sums[len(logs) : -1], sums[-1]
            logs, means = largest + totals.log(), means / totals[0]
        log_z, log_z_ratio = logs[0], logs[0] - logs[1]
        rest = torch.zeros_like(log_z)
        rest_log_ratio = torch.zeros_like(log_z)
        if len(logs) > 2:
            rest = (logs[2] - log_z).exp()
            rest_log_ratio = torch.where(rest > 0, logs[2] - logs[3] - log_z_ratio, 0.0)
        log_ratio = means[0] - (1 - rest) * log_z_ratio
        return _WholeSums(log_z, log_z_ratio, log_ratio, means[1], target, rest, rest_log_ratio)


class _Candidates:
    """The K tokens of this rank's rows that are likeliest, at each of T tokens: the support's own are among them."""

    def __init__(self, top_k: TopK, hidden: Tensor, shard: VocabularyShard) -> None:
        tokens, width, dtype = hidden.shape[0], min(top_k.size, shard.rows), logit_dtype(hidden)
        self._top_k = top_k
        self._lowest = torch.finfo(dtype).min
        self._columns = torch.zeros((tokens, width), dtype=torch.int64, device=hidden.device)
        # Log-sum-exp of the logits of all other rows, the student's and the teacher's.
        self._others = torch.full((2, tokens), self._lowest, dtype=dtype, device=hidden.device)
        self.logits = torch.zeros((2, tokens, width), dtype=dtype, device=hidden.device)
        """[2, T, K], the student's and the teacher's"""

    def take(self, at: slice, student: Tensor, teacher: Tensor) -> None:
        """Find the candidates of a chunk; its logits are left as they are."""
        if student.shape[1] == 0:
            return
        judge = student if self._top_k.of == "student" else teacher
        columns = judge.topk(self._columns.shape[1], dim=1).indices
        self._columns[at] = columns
        for number, logits in enumerate((student, teacher)):
            found = logits.gather(1, columns)
            self.logits[number, at] = found
            self._others[number, at] = logits.scatter_(1, columns, self._lowest).logsumexp(dim=1)
            logits.scatter_(1, columns, found)

    def support(self, rows_per_rank: int, group: dist.ProcessGroup | None) -> _Support:
        """The likeliest of all ranks' candidates; one gather of K logits a token and rank."""
        judged = self.logits[0 if self._top_k.of == "student" else 1]
        width = min(self._top_k.size, rows_per_rank)  # of the widest rank: all must send alike
        sent = F.pad(judged, (0, width - judged.shape[1]), value=self._lowest)
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        gathered = [sent]
        if ranks > 1:
            gathered = [torch.empty_like(sent) for _ in range(ranks)]
            dist.all_gather(gathered, sent, group=group)
        everyone = torch.cat(gathered, dim=1)
        likeliest = everyone.topk(self._top_k.size, dim=1).indices
        chosen = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, likeliest, True)
        return _Support(self._columns, chosen[:, rank * width : rank * width + judged.shape[1]].clone())

    def outside(self, support: _Support) -> Tensor:
        """Log-sum-exps [2, T] of this rank's logits outside the support, the student's and the teacher's."""
        left = self.logits.masked_fill(support.chosen, self._lowest)
        return torch.cat([self._others[:, :, None], left], dim=2).logsumexp(dim=2)


@dataclass(frozen=True)
class _Support:
    """The tokens of the support among this rank's rows."""

    columns: Tensor
    """int64 [T, K], candidates"""
    chosen: Tensor
    """bool [T, K], which of them are in the support"""

    def fill_outside(self, at: slice, values: Tensor, outside: Tensor) -> None:
        """Write `outside` [C, 1] over the `values` [C, rows] of all that is not in the support."""
        columns = self.columns[at]
        inside = torch.where(self.chosen[at], values.gather(1, columns), outside)
        values.copy_(outside.expand_as(values)).scatter_(1, columns, inside)
