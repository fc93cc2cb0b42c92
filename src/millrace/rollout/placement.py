"""Which GPUs of this machine the servers of a run get: behind the trainer's ranks first the fleet's engines, then the
judges', then the teachers'. On CPU nothing reads these numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence

from millrace.config.schema import FleetConfig, Recipe


def fleet_gpus(recipe: Recipe, *, beside_trainer: bool = True) -> list[int]:
    """Those behind the trainer's, or the trainer's own with CUDA IPC; without a trainer the first ones."""
    first = recipe.parallel.world_size if beside_trainer and recipe.fleet.transport != "ipc" else 0
    return visible_gpus(range(first, first + _count(recipe.fleet)))


def judge_gpus(recipe: Recipe, name: str) -> list[int]:
    """Those of a judge's engines: behind the fleet's, and those of the judges named before it."""
    first = _behind_fleet(recipe)
    for other, config in recipe.judges_used.items():
        count = _count(config.engine) if config.model else 0
        if other == name:
            return visible_gpus(range(first, first + count))
        first += count
    raise KeyError(name)


def teacher_gpus(recipe: Recipe, engine: FleetConfig, number: int) -> list[int]:
    """Those of the teacher `number` (counted from 0) of a stage that serves its teachers: behind all judges'."""
    judges = sum(_count(config.engine) for config in recipe.judges_used.values() if config.model)
    first = _behind_fleet(recipe) + judges + number * _count(engine)
    return visible_gpus(range(first, first + _count(engine)))


def visible_gpus(wanted: Sequence[int]) -> list[int]:
    """Device numbers of the `wanted` places among the devices that CUDA_VISIBLE_DEVICES names, which is how the
    trainer's ranks count."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if len(visible) > max(wanted, default=0) and all(entry.isdigit() for entry in visible):
        return [int(visible[i]) for i in wanted]
    return list(wanted)


def _behind_fleet(recipe: Recipe) -> int:
    """The first GPU that neither the trainer nor the fleet uses."""
    own = 0 if recipe.fleet.transport == "ipc" else recipe.parallel.world_size
    return max(recipe.parallel.world_size, own + _count(recipe.fleet))


def _count(engine: FleetConfig) -> int:
    return engine.engines * engine.tensor_parallel
