"""The fleet of a run, started by rank 0 before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from millrace.config.schema import Recipe
from millrace.rollout.fleet import Fleet


def start_fleet(recipe: Recipe, run_dir: Path) -> Fleet | None:
    """Start the engines of a run that samples, on rank 0; returns at once."""
    if int(os.environ.get("RANK", "0")) != 0 or not recipe.samples:
        return None
    fleet = Fleet(recipe.fleet, recipe.model.path, run_dir, gpus=engine_gpus(recipe))
    fleet.start()
    return fleet


def engine_gpus(recipe: Recipe) -> list[int]:
    """GPU numbers for the engines of this machine: those behind the trainer's, or the trainer's own with CUDA IPC.

    On CPU nothing reads them.
    """
    first = 0 if recipe.fleet.transport == "ipc" else recipe.parallel.world_size
    return visible_gpus(range(first, first + recipe.fleet.engines * recipe.fleet.tensor_parallel))


def visible_gpus(wanted: Sequence[int]) -> list[int]:
    """Device numbers of the `wanted` places among the devices that CUDA_VISIBLE_DEVICES names, which is how the
    trainer's ranks count."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if len(visible) > max(wanted, default=0) and all(entry.isdigit() for entry in visible):
        return [int(visible[i]) for i in wanted]
    return list(wanted)
