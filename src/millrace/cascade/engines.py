"""The fleet of a run, started by rank 0 before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from millrace.config.schema import Recipe
from millrace.rollout.fleet import Fleet
from millrace.rollout.placement import fleet_seats


def start_fleet(recipe: Recipe, run_dir: Path) -> Fleet | None:
    """Start the engines of a run that samples, on rank 0; returns at once."""
    if int(os.environ.get("RANK", "0")) != 0 or not recipe.samples:
        return None
    fleet = Fleet(recipe.fleet, recipe.model.path, run_dir, seats=fleet_seats(recipe))
    fleet.start()
    return fleet
