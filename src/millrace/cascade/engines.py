"""The fleet of a run, started by rank 0 before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from millrace.config.schema import Recipe, RlStage
from millrace.rollout.fleet import Fleet


def needs_fleet(recipe: Recipe) -> bool:
    """Whether the run samples at all: an RL stage, or domains to measure."""
    return bool(recipe.domains) or any(isinstance(stage, RlStage) for stage in recipe.stages)


def start_fleet(recipe: Recipe, run_dir: Path) -> Fleet | None:
    """Start the engines of a run that samples, on rank 0; returns at once."""
    if int(os.environ.get("RANK", "0")) != 0 or not needs_fleet(recipe):
        return None
    fleet = Fleet(recipe.fleet, recipe.model.path, run_dir)
    fleet.start()
    return fleet
