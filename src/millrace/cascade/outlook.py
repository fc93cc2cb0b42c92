"""What `millrace run` would do, stage by stage, without doing it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from millrace.cascade.gates import has_gate
from millrace.cascade.history import History
from millrace.cascade.selection import NoTeacher, choose_teachers
from millrace.config.graph import StageGraph, stage_graph
from millrace.config.schema import MopdStage, Recipe, SamplingStage, SftStage, StageConfig


def outlook(recipe: Recipe, history: History, stage: int, step: int, until: str | None = None) -> list[str]:
    """One line a stage for a run that stands at `step` of the stage with index `stage`."""
    graph = stage_graph(recipe.stages)
    names = [one.name for one in recipe.stages]
    last = len(names) if until is None else names.index(until) + 1
    rows = []
    for index, one in enumerate(recipe.stages):
        if index < stage:
            state = _done(one, history)
        elif index >= last:
            state = f"not now (--until {until})"
        elif index == stage and step:
            state = f"goes on at step {step}{_of_steps(one)}"
        else:
            state = f"to do{_of_steps(one)}"
        details = [state, *(_ahead(one, history, graph) if stage <= index < last else ())]
        rows.append((one.name, one.type, f"from {_origin(graph.parents[one.name], history)}", "; ".join(details)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]) for row in rows]


def _origin(parent: str, history: History) -> str:
    result = history.result(parent)
    return parent if result == parent else f"{parent} (its gate went back to {result})"


def _done(stage: StageConfig, history: History) -> str:
    scores = history.rows[stage.name].scores if stage.name in history.rows else {}
    measured = ", ".join(f"{domain} {score}" for domain, score in scores.items())
    return f"done{f': {measured}' if measured else ''}"


def _of_steps(stage: StageConfig) -> str:
    if isinstance(stage, SamplingStage):
        return f" of {stage.steps} steps"
    if isinstance(stage, SftStage):
        return f" of {stage.steps} steps" if stage.steps is not None else f", {stage.epochs:g} epochs"
    return ""


def _ahead(stage: StageConfig, history: History, graph: StageGraph) -> Iterator[str]:
    """What is known of a stage that has not ended."""
    if isinstance(stage, MopdStage):
        yield "taught " + ", ".join(f"{domain} by {rule}" for domain, rule in _teachers(stage, history, graph).items())
    if has_gate(stage):
        limits = (("min_gain", stage.gate.min_gain), ("max_drop", stage.gate.max_drop))
        wanted = ", ".join(f"{name} {value:g}" for name, value in limits if value is not None)
        yield f"gate: {wanted}, else {stage.gate.on_failure}"


def _teachers(stage: MopdStage, history: History, graph: StageGraph) -> dict[str, str]:
    """Each domain's rule, with the checkpoint it names as things stand."""
    try:
        chosen = choose_teachers(stage, history, graph)
    except NoTeacher:  # nothing is measured yet
        return dict(stage.teachers)
    return {domain: f"{rule} (now {chosen[domain]})" for domain, rule in stage.teachers.items()}
