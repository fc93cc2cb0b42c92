"""What `millrace plan --cluster` is asked for, together: the plan, suggestions, and how far the simulation is off."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.config.schema import Recipe
from millrace.planning import calibration, cluster_plan, scaling, suggest
from millrace.planning.calibration import Calibration, calibrate
from millrace.planning.cluster_plan import ClusterPlan, plan_on_cluster
from millrace.planning.page import plan_page
from millrace.planning.scaling import Scaling, scaled
from millrace.planning.suggest import Suggestions


@dataclass(frozen=True, kw_only=True)
class Planned:
    plan: ClusterPlan | None
    """None where the recipe as it is has no place on the cluster, but suggestions were asked for."""
    no_place: str
    """Why it has none."""
    suggestions: Suggestions | None
    scaling: Scaling | None
    calibration: Calibration | None


def planned(
    recipe: Recipe, cluster: ClusterConfig, *, suggest: bool = False, scale: bool = False, measured: Path | None = None
) -> Planned:
    """Raises ConfigError as `plan_on_cluster` does, unless there are suggestions to make."""
    made, reason = None, ""
    try:
        made = plan_on_cluster(recipe, cluster)
    except ConfigError as error:
        if not suggest:
            raise
        reason = str(error)
    return Planned(
        plan=made,
        no_place=reason,
        suggestions=_suggestions(recipe, cluster) if suggest else None,
        scaling=scaled(recipe, cluster, ModelShape.from_hf(recipe.model.path)) if scale else None,
        calibration=calibrate(measured) if measured is not None else None,
    )


def _suggestions(recipe: Recipe, cluster: ClusterConfig) -> Suggestions:
    return suggest.suggest(recipe, cluster, ModelShape.from_hf(recipe.model.path))


def as_text(made: Planned) -> str:
    blocks = [
        cluster_plan.render_text(made.plan) if made.plan else f"as it is, the recipe has no place: {made.no_place}"
    ]
    if made.suggestions is not None:
        blocks.append(suggest.render_text(made.suggestions))
    if made.scaling is not None:
        blocks.append(scaling.render_text(made.scaling))
    if made.calibration is not None:
        blocks.append(calibration.render_text(made.calibration))
    return "\n\n".join(blocks)


def to_json(made: Planned) -> str:
    """The plan's data; suggestions and calibration under keys of their own."""
    data: dict[str, Any] = cluster_plan.as_data(made.plan) if made.plan else {"no_place": made.no_place}
    if made.suggestions is not None:
        data["suggestions"] = dataclasses.asdict(made.suggestions)
        for one, suggestion in zip(data["suggestions"]["best"], made.suggestions.best, strict=True):
            one["overrides"] = str(suggestion)
    if made.scaling is not None:
        data["scaling"] = dataclasses.asdict(made.scaling)
    if made.calibration is not None:
        data["calibration"] = dataclasses.asdict(made.calibration)
    return json.dumps(data, indent=2)


def write_page(made: Planned, file: Path) -> None:
    """Raises ConfigError where there is no plan to draw."""
    if made.plan is None:
        raise ConfigError(f"there is no plan to draw on {file}: {made.no_place}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(plan_page(made.plan, as_text(made)), encoding="utf-8")
