"""The stage graph as inline SVG: what started from what, what taught whom, and what the gates said.

Drawn twice from one layout: from left to right for wide windows and short cascades, from top to bottom for all others.
The lineage of the last stage lies on lane 0, side branches on lanes beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from millrace.config.graph import START
from millrace.observe.entries import stage_of
from millrace.observe.report.matrix import outcome
from millrace.observe.report.record import RunRecord, StageRecord
from millrace.observe.report.texts import clipped, escaped

WIDEST = 7
"""Columns of a graph that is drawn from left to right."""

BOX_W, BOX_H = 158, 92
"""Pixels of a node."""

_COLUMN, _LANE_BELOW = BOX_W + 32, BOX_H + 40
_ROW, _LANE_ASIDE, _GUTTER = BOX_H + 26, 74, 44
_STALK = 22
"""From top to bottom: where edges leave a node, left of the side branches."""

Direction = Literal["across", "down"]


@dataclass(frozen=True)
class Place:
    order: int
    """Number in the order in which the stages run; `start` is 0."""
    depth: int
    """Stages between it and `start`."""
    lane: int


@dataclass(frozen=True)
class Teaching:
    """An edge from a teacher to the stage it teaches."""

    teacher: str
    stage: str
    text: str
    """Domains, each with the step where its teacher is not the stage's end."""


def places(parents: Mapping[str, str]) -> dict[str, Place]:
    """Where each stage goes. `parents` maps stages to stages or `start`, in the order of the run."""
    depth = {START: 0}
    for stage, parent in parents.items():
        depth[stage] = depth[parent] + 1
    lanes = _lanes(parents, depth)
    order = [START, *parents]
    return {name: Place(order.index(name), depth[name], lanes[name]) for name in order}


def _lanes(parents: Mapping[str, str], depth: Mapping[str, int]) -> dict[str, int]:
    """Lane 0 for the lineage of the last stage; a side branch has the first lane that is free at its depth."""
    lanes = {START: 0}
    here = list(parents)[-1] if parents else START
    while here != START:
        lanes[here] = 0
        here = parents[here]
    taken = {(depth[name], 0) for name in lanes}
    for stage, parent in parents.items():
        if stage in lanes:
            continue
        lane = max(1, lanes[parent])
        while (depth[stage], lane) in taken:
            lane += 1
        lanes[stage] = lane
        taken.add((depth[stage], lane))
    return lanes


def teachings(stages: Sequence[StageRecord]) -> list[Teaching]:
    """Who taught whom: the checkpoints that were chosen, or, before a stage starts, those that its rules name."""
    found: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        chosen = stage.teachers or {d: r[6:-1] for d, r in stage.rules.items() if r.startswith("stage(")}
        for domain, label in chosen.items():
            step = label.removeprefix(stage_of(label))
            found.setdefault((stage_of(label), stage.name), []).append(f"{domain} {step}".strip())
    return [Teaching(teacher, stage, ", ".join(domains)) for (teacher, stage), domains in found.items()]


def graph_html(run: RunRecord) -> str:
    if not run.stages:
        return "<p class='empty'>No stage is known yet.</p>"
    names = {START, *(stage.name for stage in run.stages)}
    parents = {stage.name: stage_of(stage.parent) for stage in run.stages}
    parents = {stage: parent if parent in names else START for stage, parent in parents.items()}
    at, taught = places(parents), [t for t in teachings(run.stages) if t.teacher in names]
    down = _svg(run, at, parents, taught, "down")
    if max(place.depth for place in at.values()) >= WIDEST:
        return f"<div class='graph always'>{down}</div>{_legend(taught)}"
    across = _svg(run, at, parents, taught, "across")
    return f"<div class='graph wide'>{across}</div><div class='graph narrow'>{down}</div>{_legend(taught)}"


def _legend(taught: Sequence[Teaching]) -> str:
    dashed = ", dashed lines from teachers to the stage that learns from them" if taught else ""
    return f"<p class='note'>Lines lead from a checkpoint to the stage that starts from it{dashed}.</p>"


def _corner(place: Place, direction: Direction, top: int) -> tuple[int, int]:
    """Left upper corner of a node."""
    if direction == "across":
        return 4 + place.depth * _COLUMN, top + place.lane * _LANE_BELOW
    return _GUTTER + place.lane * _LANE_ASIDE, 4 + place.order * _ROW


def _svg(
    run: RunRecord,
    at: Mapping[str, Place],
    parents: Mapping[str, str],
    taught: Sequence[Teaching],
    direction: Direction,
) -> str:
    top = _headroom(at, taught) if direction == "across" else 4
    corner = {name: _corner(place, direction, top) for name, place in at.items()}
    aside = any(at[t.teacher].lane for t in taught)
    width = max(x for x, _ in corner.values()) + BOX_W + (22 if direction == "down" and aside else 4)
    height = max(y for _, y in corner.values()) + BOX_H + 4
    edges = "".join(_edge(corner[parent], corner[stage], direction) for stage, parent in parents.items())
    lessons = "".join(_lesson(t, at, corner, direction) for t in taught)
    nodes = _start_node(corner[START]) + "".join(_node(stage, corner[stage.name]) for stage in run.stages)
    return (
        f"<svg viewBox='0 0 {width} {height}' style='max-width:{width}px' role='img' "
        f"aria-label='Graph of the {len(run.stages)} stages'>{edges}{lessons}{nodes}</svg>"
    )


def _arc_height(span: int) -> int:
    """How far an arc's control points lie above lane 0; the arc itself reaches three quarters of it."""
    return 30 + 32 * span


def _headroom(at: Mapping[str, Place], taught: Sequence[Teaching]) -> int:
    """Pixels above lane 0 for the arcs of its teachers and their words."""
    spans = [at[t.stage].depth - at[t.teacher].depth for t in taught if at[t.teacher].lane == 0]
    return 4 + (18 + round(0.75 * _arc_height(max(spans))) if spans else 0)


def _edge(a: tuple[int, int], b: tuple[int, int], direction: Direction) -> str:
    if direction == "across":
        x1, y1, x2, y2 = a[0] + BOX_W, a[1] + BOX_H // 2, b[0], b[1] + BOX_H // 2
        middle = (x1 + x2) / 2
        path = f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2 - 5} {y2}"
        tip = f"M{x2 - 6} {y2 - 4}L{x2} {y2}L{x2 - 6} {y2 + 4}Z"
    elif a[0] == b[0]:
        x, y1, y2 = a[0] + _STALK, a[1] + BOX_H, b[1]
        path, tip = f"M{x} {y1}V{y2 - 5}", f"M{x - 4} {y2 - 6}L{x} {y2}L{x + 4} {y2 - 6}Z"
    else:
        x, y1, x2, y2 = a[0] + _STALK, a[1] + BOX_H, b[0], b[1] + BOX_H // 2
        turn = 8 if x2 > x else -8
        path = f"M{x} {y1}V{y2 - 8}Q{x} {y2} {x + turn} {y2}H{x2 - 5}"
        tip = f"M{x2 - 6} {y2 - 4}L{x2} {y2}L{x2 - 6} {y2 + 4}Z"
    return f"<path class='edge' d='{path}'/><path class='tip' d='{tip}'/>"


def _lesson(t: Teaching, at: Mapping[str, Place], corner: Mapping[str, tuple[int, int]], direction: Direction) -> str:
    teacher, stage, aside = corner[t.teacher], corner[t.stage], at[t.teacher].lane > 0
    if direction == "across":
        drawn = _lesson_across(t, teacher, stage, at[t.stage].depth - at[t.teacher].depth, aside)
    else:
        outside = max(x for x, _ in corner.values()) + BOX_W + 16 if aside else None
        drawn = _lesson_down(teacher, stage, at[t.stage].order - at[t.teacher].order, outside)
    title = f"<title>{escaped(t.stage)} learns {escaped(t.text)} from {escaped(t.teacher)}</title>"
    return f"<g class='lesson'>{title}{drawn}</g>"


def _lesson_across(t: Teaching, a: tuple[int, int], b: tuple[int, int], span: int, aside: bool) -> str:
    if aside:  # up into the gap between the lanes, along it, and up to the stage
        x1, y1, x2, y2 = a[0] + BOX_W // 2, a[1], b[0] + BOX_W // 2, b[1] + BOX_H
        gap = y2 + (_LANE_BELOW - BOX_H) // 2
        path = f"M{x1} {y1}V{gap + 8}Q{x1} {gap} {x1 + 8} {gap}H{x2 - 8}Q{x2} {gap} {x2} {gap - 8}V{y2 + 6}"
        tip = f"M{x2 - 4} {y2 + 7}L{x2} {y2}L{x2 + 4} {y2 + 7}Z"
        x, y, anchor = x1 + 14, gap - 5, "start"
    else:
        x1, y1, x2, y2 = a[0] + BOX_W // 2, a[1], b[0] + BOX_W // 2 - 14 * (span - 1), b[1]
        height = _arc_height(span)
        path = f"M{x1} {y1}C{x1} {y1 - height} {x2} {y1 - height} {x2} {y2 - 6}"
        tip = f"M{x2 - 4} {y2 - 7}L{x2} {y2}L{x2 + 4} {y2 - 7}Z"
        x, y, anchor = (x1 + x2) // 2, round(y1 - 0.75 * height) - 5, "middle"
    text = f"<text x='{x}' y='{y}' text-anchor='{anchor}'>{escaped(clipped(t.text, 34))}</text>"
    return f"<path d='{path}'/><path class='tip' d='{tip}'/>{text}"


def _lesson_down(a: tuple[int, int], b: tuple[int, int], span: int, outside: int | None) -> str:
    """`outside`: where a side branch's line runs down, beyond all nodes; lane 0 has its lines on the left."""
    y1, y2 = a[1] + BOX_H // 2 + 8, b[1] + BOX_H // 2 + 8
    if outside is not None:
        x1, x2 = a[0] + BOX_W, b[0] + BOX_W
        down = f"Q{outside} {y1} {outside} {y1 + 8}V{y2 - 8}Q{outside} {y2} {outside - 8} {y2}"
        path = f"M{x1} {y1}H{outside - 8}{down}H{x2 + 6}"
        tip = f"M{x2 + 7} {y2 - 4}L{x2} {y2}L{x2 + 7} {y2 + 4}Z"
    else:
        bulge = a[0] - 8 - 12 * min(3, span)
        path = f"M{a[0]} {y1}C{bulge} {y1} {bulge} {y2} {b[0] - 6} {y2}"
        tip = f"M{b[0] - 7} {y2 - 4}L{b[0]} {y2}L{b[0] - 7} {y2 + 4}Z"
    return f"<path d='{path}'/><path class='tip' d='{tip}'/>"


def _start_node(corner: tuple[int, int]) -> str:
    x, y = corner
    return (
        f"<g class='node start'><rect x='{x}' y='{y}' width='{BOX_W}' height='{BOX_H}' rx='8'/>"
        f"<text class='name' x='{x + 12}' y='{y + 24}'>{START}</text>"
        f"<text x='{x + 12}' y='{y + 43}'>the recipe's model</text></g>"
    )


MARKS = {"done": "●", "running": "◐", "interrupted": "◌", "waiting": "○"}


def _node(stage: StageRecord, corner: tuple[int, int]) -> str:
    x, y = corner
    kind, gate_text = gate_words(stage)
    domains = ", ".join(stage.domains) or {"sft": "conversations"}.get(stage.type, "held-out sets")
    lines = [
        f"<text class='name' x='{x + 12}' y='{y + 24}'>{escaped(clipped(stage.name, 17))}</text>",
        f"<text x='{x + 12}' y='{y + 43}'>{escaped(clipped(f'{stage.type} · {domains}', 22))}</text>",
        f"<text x='{x + 12}' y='{y + 60}'>{MARKS[stage.status]} {escaped(progress_words(stage))}</text>",
        f"<text class='{kind}' x='{x + 12}' y='{y + 79}'>{escaped(gate_text)}</text>",
    ]
    reason = f" Gate: {stage.gate.get('reason', '')}" if stage.gate else ""
    title = f"{stage.name}: {stage.type} on {domains}, {progress_words(stage)}.{reason}"
    return (
        f"<g class='node {stage.status} gate-{kind}'><title>{escaped(title)}</title>"
        f"<rect x='{x}' y='{y}' width='{BOX_W}' height='{BOX_H}' rx='8'/>{''.join(lines)}</g>"
    )


def progress_words(stage: StageRecord) -> str:
    if stage.status == "waiting":
        return "waiting"
    if stage.status == "done":
        return f"done, {stage.steps} steps" if stage.steps else "done"
    of = f" of {stage.planned_steps}" if stage.planned_steps else ""
    return f"{stage.status}, {stage.steps}{of}"


def gate_words(stage: StageRecord) -> tuple[Literal["good", "bad", "open", "none"], str]:
    """Kind and words of a node's gate line."""
    if stage.gate:
        words = {"stop": "stopped", "warn": "warned", "back": "went back"}
        if stage.gate.get("passed"):
            return "good", "✓ gate passed"
        return "bad", f"✕ gate failed, {words.get(str(stage.gate.get('action')), outcome(stage.gate))}"
    asked = stage.config.gate if stage.config else None
    if asked and (asked.min_gain is not None or asked.max_drop is not None):
        return "open", "gate not reached"
    return "none", "no gate"
