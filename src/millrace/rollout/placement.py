"""Which GPUs of this machine the servers of a run get: behind the trainer's ranks first the fleet's engines, then the
judges', then the teachers'. On CPU nothing reads these numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence

from millrace.config.schema import FleetConfig, Recipe
from millrace.rollout.member import FleetError
from millrace.rollout.server import Device, engine_device


def fleet_gpus(recipe: Recipe, *, beside_trainer: bool = True) -> list[str]:
    """Those behind the trainer's, or the trainer's own with CUDA IPC; without a trainer the first ones."""
    first = recipe.parallel.world_size if beside_trainer and recipe.fleet.transport != "ipc" else 0
    return visible_gpus(range(first, first + _count(recipe.fleet)))


def judge_gpus(recipe: Recipe, name: str) -> list[str]:
    """Those of a judge's engines: behind the fleet's, and those of the judges named before it."""
    first = _behind_fleet(recipe)
    for other, config in recipe.judges_used.items():
        count = _count(config.engine) if config.model else 0
        if other == name:
            return visible_gpus(range(first, first + count))
        first += count
    raise KeyError(name)


def teacher_gpus(recipe: Recipe, engine: FleetConfig, number: int) -> list[str]:
    """Those of the teacher `number` (counted from 0) of a stage that serves its teachers: behind all judges'."""
    judges = sum(_count(config.engine) for config in recipe.judges_used.values() if config.model)
    first = _behind_fleet(recipe) + judges + number * _count(engine)
    return visible_gpus(range(first, first + _count(engine)))


def visible_gpus(wanted: Sequence[int], device: Device | None = None) -> list[str]:
    """The `wanted` places among the devices that CUDA_VISIBLE_DEVICES names, which is how the trainer's ranks count:
    its entries as they stand there, numbers or GPU-... or MIG-... names. Unset or empty it names all devices.

    `device`: where servers run; found out when absent. Raises FleetError where they run on CUDA and too few are named.
    """
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    needed = max(wanted, default=-1) + 1
    if visible and needed <= len(visible):
        return [visible[place] for place in wanted]
    if visible and (device or engine_device()) == "cuda":
        raise FleetError(
            f"the trainer's ranks and the servers up to this one want {needed} GPUs, but CUDA_VISIBLE_DEVICES names "
            f"{len(visible)} ({','.join(visible)}); let it name more, or lower parallel.dp, engines or tensor_parallel"
        )
    return [str(place) for place in wanted]


def _behind_fleet(recipe: Recipe) -> int:
    """The first GPU that neither the trainer nor the fleet uses."""
    own = 0 if recipe.fleet.transport == "ipc" else recipe.parallel.world_size
    return max(recipe.parallel.world_size, own + _count(recipe.fleet))


def _count(engine: FleetConfig) -> int:
    return engine.engines * engine.tensor_parallel
