"""Multi-domain on-policy distillation: rollout, teach, train, sync, record.

As Nemotron-Cascade 2 runs it (arXiv 2603.19220, section 4.4): the student samples, and on the student's own tokens the
one teacher of the prompt's domain says how much likelier or unlikelier it finds each of them; no rewards, no groups.
Domains that are `rewarded` instead are trained by their rewards in the same batch. The signals and their equations are
in `algorithms.distillation`, where teachers live in `stages.teachers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from millrace.algorithms.distillation import mopd_loss_fn
from millrace.config.schema import MopdStage
from millrace.data.batch import TokenBatch
from millrace.megatron.divergence import Divergence, TeacherStates
from millrace.stages.batches import answer_advantages, answers_batch
from millrace.stages.collect import GroupCollector
from millrace.stages.context import Progress, StageContext
from millrace.stages.groups import Group
from millrace.stages.rl import mismatch_guard
from millrace.stages.sources import WeightSource
from millrace.stages.teachers import Members, ResidentTeachers, ServedTeachers, TimeSharedTeachers, open_teachers


def run_mopd(
    stage: MopdStage,
    ctx: StageContext,
    progress: Progress,
    measure: Callable[[int], None],
    chosen: Mapping[str, WeightSource],
) -> None:
    """Train to the stage's end from `progress`, each domain taught by its `chosen` weights. Collective.

    `measure(step)` puts held-out pass rates on record; it is called every `evaluation.every` steps.
    """
    assert ctx.sync is not None
    every = ctx.recipe.evaluation.every
    collector = GroupCollector(stage, ctx, progress.stage, progress.sampler)
    loss_fn = mopd_loss_fn(
        stage.signal,
        ratio_low=stage.ratio_low,
        ratio_high=stage.ratio_high,
        advantage_clip=stage.advantage_clip,
        teachers=tuple(stage.teachers),
    )
    with ExitStack() as stack:
        lesson = Lesson(stage, ctx, collector, chosen, stack)
        ctx.begin_stage(stage, progress, stage.steps)
        ctx.push_weights()
        for step in range(progress.step, stage.steps):
            if every and step and step % every == 0:
                measure(step)
            with ctx.timed("rollout"):
                collected = collector.collect(step)
                batch = ctx.control.broadcast_batch(
                    mopd_batch(collected.groups, stage) if ctx.control.is_main else None
                )
            ctx.rest_engines()
            with ctx.timed("teacher"):
                batch, divergence = lesson.teach(step, batch)
            with ctx.timed("train"):
                values = ctx.policy.train_step(
                    batch,
                    loss_fn,
                    temperature=stage.sampling.temperature,
                    entropy=True,
                    before_update=mismatch_guard(stage),
                    divergence=divergence,
                )
            values = {**collected.metrics, **per_teacher_means(values, stage), "tokens/scored": taught_tokens(batch)}
            values |= ctx.sync_step()
            ctx.end_step(stage, Progress(progress.stage, step + 1, collected.sampler), stage.steps, values)


class Lesson:
    """What the teachers say of a step's batch."""

    def __init__(
        self,
        stage: MopdStage,
        ctx: StageContext,
        collector: GroupCollector,
        chosen: Mapping[str, WeightSource],
        stack: ExitStack,
    ) -> None:
        self._stage, self._ctx, self._collector = stage, ctx, collector
        self._labels = [chosen[domain].label for domain in stage.teachers]
        """Label of the k-th teacher of the stage, counted from 0."""
        sources = {source.label: source for source in chosen.values()}
        self._teachers = open_teachers(stage, ctx, list(sources.values()), stack)

    def teach(self, step: int, batch: TokenBatch) -> tuple[TokenBatch, Divergence | None]:
        """The batch with the stream `teacher_logp`, or the teachers' states where a whole distribution is compared."""
        if self._stage.signal == "sampled":
            return batch.with_streams(teacher_logp=self._logprobs(step, batch)), None
        assert not isinstance(self._teachers, ServedTeachers), "the recipe's rules refuse it"
        self._record(step, batch, None)
        return batch, self._divergence(self._teachers, batch)

    def _members(self, batch: TokenBatch) -> Members:
        members: dict[str, list[int]] = {}
        for sequence, number in enumerate(teacher_of_sequence(batch)):
            if number:
                members.setdefault(self._labels[number - 1], []).append(sequence)
        return members

    def _logprobs(self, step: int, batch: TokenBatch) -> Tensor:
        """The teachers' log-probs, those on record for these answers where there are any."""
        recorded = self._ctx.control.on_main(lambda: self._collector.recorded_streams(step))
        if recorded is not None:
            return joined(batch, recorded)
        values = self._teachers.logprobs(batch, self._members(batch), self._stage.sampling.temperature)
        self._record(step, batch, values)
        return values

    def _record(self, step: int, batch: TokenBatch, teacher_logp: Tensor | None) -> None:
        if self._ctx.control.is_main:
            self._collector.record_streams(step, by_answer(batch, teacher_logp))

    def _divergence(self, teachers: ResidentTeachers | TimeSharedTeachers, batch: TokenBatch) -> Divergence:
        """What each teacher knows of its tokens; one that teaches several domains is looked at once for all."""
        states: dict[int, TeacherStates] = {}
        for label, policy in teachers.each(list(dict.fromkeys(self._labels))):
            for number in self._numbers(label):
                states[number] = policy.teacher_states(batch, number)
        top_k = self._stage.top_k if self._stage.signal == "top_k" else None
        return Divergence([states[number] for number in sorted(states)], top_k, self._stage.support)

    def _numbers(self, label: str) -> list[int]:
        """The numbers, from 1, of the stage's teachers that these weights are."""
        return [number for number, own in enumerate(self._labels, 1) if own == label]


def mopd_batch(groups: Sequence[Group], stage: MopdStage) -> TokenBatch:
    """The groups' answers as one batch with the streams `weight`, `mask`, `rollout_logp`, `taught` (number of the
    teacher among the stage's, from 1; 0 where rewards teach) and `advantage` (0 where a teacher does)."""
    numbers = {domain: number for number, domain in enumerate(stage.teachers, 1)}
    rewarded = [group for group in groups if group.episode.domain not in numbers]
    from_rewards = iter(answer_advantages(rewarded, stage.advantage))
    taught = [numbers.get(group.episode.domain, 0) for group in groups for _ in group.answers]
    return answers_batch(
        groups,
        advantages=[0.0 if number else next(from_rewards) for number in taught],
        drop_overlong=stage.overlong == "filter",
        aggregation=stage.aggregation,
        taught=taught,
    )


def teacher_of_sequence(batch: TokenBatch) -> list[int]:
    """The stream `taught` at each sequence's last token, which is one of its answer."""
    return batch.streams["taught"][batch.offsets[1:] - 1].to(torch.int64).tolist()


def taught_tokens(batch: TokenBatch) -> float:
    """Tokens that teachers went through, prompts included."""
    taught = torch.tensor(teacher_of_sequence(batch)) > 0
    return float(batch.lengths[taught].sum())


def per_teacher_means(values: Mapping[str, float], stage: MopdStage) -> dict[str, float]:
    """`reverse_kl/DOMAIN` as a mean over that teacher's tokens instead of its share of the whole batch's, and
    `reverse_kl` over those of all teachers. A teacher without a token in this batch has none."""
    means = {name: value for name, value in values.items() if not name.startswith("reverse_kl/")}
    shares = {domain: values[f"taught/{domain}"] for domain in stage.teachers if values[f"taught/{domain}"]}
    for domain, share in shares.items():
        means[f"reverse_kl/{domain}"] = values[f"reverse_kl/{domain}"] / share
    if shares:
        means["reverse_kl"] = sum(values[f"reverse_kl/{domain}"] for domain in shares) / sum(shares.values())
    return means


def by_answer(batch: TokenBatch, teacher_logp: Tensor | None) -> list[dict[str, object]]:
    """One record an answer: its reward's advantage, or its teacher's log-probs of its own tokens."""
    lines: list[dict[str, object]] = []
    offsets, numbers = batch.offsets.tolist(), teacher_of_sequence(batch)
    for start, end, number in zip(offsets, offsets[1:], numbers, strict=False):
        line: dict[str, object] = {"advantage": float(batch.streams["advantage"][end - 1])}
        if number and teacher_logp is not None:
            answer = batch.streams["taught"][start:end] > 0
            line = {"teacher_logp": teacher_logp[start:end][answer].tolist()}
        lines.append(line)
    return lines


def joined(batch: TokenBatch, lines: Sequence[Mapping[str, list[float]]]) -> Tensor:
    """The inverse of `by_answer`: teachers' log-probs at their tokens, 0 elsewhere."""
    values = torch.zeros(batch.tokens.numel())
    values[batch.streams["taught"] > 0] = torch.tensor([v for line in lines for v in line.get("teacher_logp", ())])
    return values
