"""One rank of the teachers' test: the same batch scored by two teachers in each of the three placements.

Usage: teachers_worker.py FOLDER; FOLDER holds the checkpoints base/ and other/. Rank 0 writes FOLDER/found.pt.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from millrace.config.model_shape import ModelShape
from millrace.config.schema import (
    FleetConfig,
    ModelConfig,
    MopdStage,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainerConfig,
)
from millrace.data.batch import TokenBatch
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.policy import Policy
from millrace.megatron.topology import Topology, init_distributed
from millrace.stages.context import Progress, StageContext
from millrace.stages.control import ControlGroup
from millrace.stages.sources import WeightSource
from millrace.stages.teachers import open_teachers

PARALLEL = ParallelConfig(tp=2, sequence_parallel=True)
TRAINER = TrainerConfig(device="cpu", max_tokens_per_micro_batch=64, threads_per_rank=1, collective_timeout_s=600)
ENGINE = FleetConfig(dtype="float32", max_model_len=128, max_num_seqs=16, kv_cache_bytes=67108864)
PLACEMENTS = ("time_shared", "resident", "served")
LENGTHS = (12, 30, 7, 21)
MEMBERS = {"start": [0, 2], "other": [1, 3]}


def main(folder: Path) -> None:
    topology = init_distributed(PARALLEL, TRAINER, seed=1)
    ctx = context(folder, topology)
    before = weights_of(ctx.policy)
    found = {"sources": save_teacher(ctx, folder)}
    batch = TokenBatch.from_sequences(sequences())
    for placement in PLACEMENTS:
        with ExitStack() as stack:
            stage = MopdStage(name="mopd", steps=1, teachers={}, placement=placement, teacher_engine=ENGINE)
            teachers = open_teachers(stage, ctx, [source(ctx, folder, label) for label in MEMBERS], stack)
            found[placement] = teachers.logprobs(batch, MEMBERS, temperature=1.0)
        after = weights_of(ctx.policy)
        found[f"unchanged after {placement}"] = all(torch.equal(before[name], after[name]) for name in before)
    if topology.rank == 0:
        torch.save(found, folder / "found.pt")
    topology.close()


def context(folder: Path, topology: Topology) -> StageContext:
    model = ModelConfig(path=str(folder / "base"), dtype="float32")
    shape = ModelShape.from_hf(model.path)
    policy = Policy(model, shape, PARALLEL, TRAINER, topology, optimizer=OptimizerConfig(), seed=1)
    policy.load_hf(model.path)
    recipe = Recipe(name="teachers", run_dir=str(folder / "run"), model=model, parallel=PARALLEL, stages=())
    return StageContext(
        recipe=recipe,
        run_dir=folder / "run",
        control=ControlGroup(),
        policy=policy,
        checkpointer=Checkpointer(folder / "run" / "checkpoints", keep=1),
        conversations={},
        sync=None,
        player=None,
        active_parameters=shape.active_parameter_count(),
        origin=WeightSource("start", folder / "base", checkpoint=False),
        console=None,
        metrics=None,
        reached=Progress(),
        saved=Progress(),
    )


def save_teacher(ctx: StageContext, folder: Path) -> list[str]:
    """A checkpoint of the run with the weights of other/."""
    twin = ctx.policy.frozen_twin()
    twin.load_hf(str(folder / "other"))
    ctx.checkpointer.save(twin, 3, {}, name="other", keep_always=True)
    return list(MEMBERS)


def source(ctx: StageContext, folder: Path, label: str) -> WeightSource:
    if label == "start":
        return ctx.origin
    return WeightSource(label, folder / "run" / "checkpoints" / label, checkpoint=True)


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.module.named_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
