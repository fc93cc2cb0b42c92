"""The teachers of on-policy distillation, in three placements that give the same numbers.

    time_shared   their weights lie in host memory and are swapped into the trainer's own model, forward only
    resident      a model of its own for each beside the policy
    served        a vLLM server for each, which gives the log-probs of prompts

A checkpoint that teaches several domains is there once. Sequences are scored by their own teacher alone: on the
trainer's ranks one teacher after the other, so a step swaps as often as there are distinct teachers, and once back;
served ones all at one time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from millrace.config.schema import MopdStage
from millrace.data.batch import TokenBatch
from millrace.megatron.export import export_hf
from millrace.megatron.lent_weights import copy_to_host, put
from millrace.megatron.policy import Policy
from millrace.rollout.fleet import Fleet
from millrace.rollout.placement import teacher_seats
from millrace.stages.context import StageContext
from millrace.stages.control import ControlGroup
from millrace.stages.sources import WeightSource

Members = Mapping[str, Sequence[int]]
"""Label of a teacher -> the sequences of a batch that it teaches."""


class Teachers(Protocol):
    """Collective: every rank calls every method in the same order."""

    def logprobs(self, batch: TokenBatch, members: Members, temperature: float) -> Tensor:
        """float32 [N] on every rank: log pi_teacher of each token of the members, 0 for all other sequences."""
        ...


class TeachersOnRanks(Protocol):
    """Teachers whose whole distribution can be looked at."""

    def each(self, labels: Sequence[str]) -> Iterator[tuple[str, Policy]]:
        """One teacher after the other, each as a model that holds its weights until the next; iterate to the end."""
        ...


def open_teachers(
    stage: MopdStage, ctx: StageContext, sources: Sequence[WeightSource], stack: ExitStack
) -> ResidentTeachers | TimeSharedTeachers | ServedTeachers:
    """Load each teacher once, where the stage wants it; `stack` ends what was started."""
    match stage.placement:
        case "resident":
            return ResidentTeachers({source.label: ctx.twin(source) for source in sources})
        case "time_shared":
            return TimeSharedTeachers(ctx, sources)
        case "served":
            return ServedTeachers(stage, ctx, sources, stack)


class ResidentTeachers:
    def __init__(self, twins: Mapping[str, Policy]) -> None:
        self._twins = twins

    def each(self, labels: Sequence[str]) -> Iterator[tuple[str, Policy]]:
        yield from ((label, self._twins[label]) for label in labels)

    def logprobs(self, batch: TokenBatch, members: Members, temperature: float) -> Tensor:
        return _logprobs_of_each(self, batch, members, temperature)


class TimeSharedTeachers:
    def __init__(self, ctx: StageContext, sources: Sequence[WeightSource]) -> None:
        self._policy = ctx.policy
        own = copy_to_host(ctx.policy)
        self._weights = {}
        for source in sources:
            source.load_into(ctx.policy, ctx.checkpointer)
            self._weights[source.label] = copy_to_host(ctx.policy)
        put(ctx.policy, own)

    def each(self, labels: Sequence[str]) -> Iterator[tuple[str, Policy]]:
        own = copy_to_host(self._policy)
        try:
            for label in labels:
                put(self._policy, self._weights[label])
                yield label, self._policy
        finally:
            put(self._policy, own)

    def logprobs(self, batch: TokenBatch, members: Members, temperature: float) -> Tensor:
        return _logprobs_of_each(self, batch, members, temperature)


class ServedTeachers:
    """The checkpoints are exported to RUN_DIR/teachers, since vLLM reads Hugging Face format."""

    def __init__(self, stage: MopdStage, ctx: StageContext, sources: Sequence[WeightSource], stack: ExitStack) -> None:
        self._control: ControlGroup = ctx.control
        self._fleets: dict[str, Fleet] = {}
        folders = _exported(ctx, sources)
        for number, (label, folder) in enumerate(folders.items()) if ctx.control.is_main else ():
            seats = teacher_seats(ctx.recipe, stage.teacher_engine, number)
            kind = f"teacher-{folder.name}"
            self._fleets[label] = Fleet(stage.teacher_engine, str(folder), ctx.run_dir, seats=seats, kind=kind)
            stack.callback(self._fleets[label].close)
            self._fleets[label].start()
        ctx.say(f"{stage.name}: waiting for the servers of {len(folders)} teachers")
        ctx.control.on_main_until_stopped(self._wait_ready)

    def _wait_ready(self) -> None:
        for fleet in self._fleets.values():
            fleet.wait_ready()
            fleet.serve_checkpoint()

    def logprobs(self, batch: TokenBatch, members: Members, temperature: float) -> Tensor:
        assert temperature == 1.0, "the recipe's rules ask for it"
        values = torch.zeros(batch.tokens.numel())
        sequences = {
            label: [tokens.tolist() for tokens in batch.select(indices).sequences()]
            for label, indices in members.items()
        }
        scores = self._control.on_main_until_stopped(lambda: scored_together(self._fleets, sequences))
        for label, indices in members.items():
            values[batch.positions(indices)] = torch.tensor([value for each in scores[label] for value in each])
        return values


def scored_together(
    fleets: Mapping[str, Fleet], sequences: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, list[list[float]]]:
    """What `Fleet.prompt_logprobs` says of each label's sequences, all fleets at one time. When one fails, or on
    Ctrl-C, the others are left."""
    futures = {label: fleets[label].submit_prompt_logprobs(asked) for label, asked in sequences.items()}
    try:
        return {label: future.result() for label, future in futures.items()}
    finally:
        for future in futures.values():
            future.cancel()


def _exported(ctx: StageContext, sources: Sequence[WeightSource]) -> dict[str, Path]:
    """Each teacher as a Hugging Face checkpoint under RUN_DIR/teachers. The policy's weights are as before."""
    own, folders = copy_to_host(ctx.policy), {}
    for source in sources:
        folders[source.label] = ctx.run_dir / "teachers" / source.label.replace("@", "-step-")
        source.load_into(ctx.policy, ctx.checkpointer)
        export_hf(ctx.policy, ctx.recipe.model.path, folders[source.label], overwrite=True)
    put(ctx.policy, own)
    return folders


def _logprobs_of_each(teachers: TeachersOnRanks, batch: TokenBatch, members: Members, temperature: float) -> Tensor:
    values = torch.zeros(batch.tokens.numel())
    for label, teacher in teachers.each(list(members)):
        part = teacher.logprobs(batch.select(members[label]), temperature=temperature)[0]
        values[batch.positions(members[label])] = part
    return values
