"""The curves of a run as plain data for the page: small charts of each stage, and what the comparison begins with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from millrace.observe.metrics import METRICS
from millrace.observe.report.record import Row, RunRecord, StageRecord

MOST_POINTS = 400
"""Points of one curve; longer ones are thinned out, so that a run of any length gives a page that opens at once."""

PHASES = ("rollout", "teacher", "train", "sync")
"""Phases of a step from the bottom of their chart up; further ones lie on top."""

NOT_A_PHASE = "time/step"

Point = tuple[float, float]


@dataclass(frozen=True)
class ChartKind:
    title: str
    metrics: tuple[str, ...]
    """Names of metrics; DOMAIN stands for each domain of the stage."""
    unit: str
    """What the vertical axis counts."""


CHARTS = (
    ChartKind("Reward", ("reward/mean", "reward/DOMAIN"), "reward"),
    ChartKind("Held-out pass rate", ("held_out/DOMAIN",), "pass rate, 0 to 1"),
    ChartKind("Reverse KL to the teacher", ("reverse_kl/DOMAIN",), "nats"),
    ChartKind("Answer length", ("reward/length",), "tokens"),
    ChartKind("Entropy", ("entropy",), "nats"),
    ChartKind("Log-prob mismatch", ("mismatch/mean",), "nats"),
    ChartKind("Gradient norm", ("grad_norm",), "L2 norm"),
    ChartKind("Loss", ("loss",), "loss"),
    ChartKind("KL to the reference", ("kl",), "nats"),
    ChartKind(
        "Judge: first answer preferred, failed, unparsable",
        ("judge/first_wins", "judge/failed", "judge/unparsable"),
        "share of verdicts",
    ),
    ChartKind("Groups without variance", ("groups/without_variance",), "share of groups"),
)


def curve_data(run: RunRecord) -> dict[str, Any]:
    """What the page draws: {"stages": [{"name", "type", "charts"}], "compare": {"metric", "stages"}}."""
    stages = [
        {"name": stage.name, "type": stage.type, "steps": stage.steps, "charts": stage_charts(stage, run)}
        for stage in run.stages
        if stage.rows
    ]
    metric, names = comparison_default(run.stages)
    return {"stages": stages, "compare": {"metric": metric, "stages": names}, "most_points": MOST_POINTS}


def stage_charts(stage: StageRecord, run: RunRecord) -> list[dict[str, Any]]:
    """The charts of a stage that have anything to draw, each with its explanation."""
    charts = []
    for kind in CHARTS:
        series = [
            _series(name, thinned(points))
            for name in _names(kind, run.domains)
            if len(points := _points(name, stage, run)) > 1
        ]
        if series:
            metric = METRICS[kind.metrics[0]]
            told = {"meaning": metric.meaning, "healthy": metric.healthy}
            charts.append({"title": kind.title, "unit": kind.unit, "series": series, **told})
    return [*charts, *_time_chart(stage)]


def _names(kind: ChartKind, domains: Sequence[str]) -> list[str]:
    return [
        name
        for pattern in kind.metrics
        for name in ([pattern.replace("DOMAIN", d) for d in domains] if "DOMAIN" in pattern else [pattern])
    ]


def _points(name: str, stage: StageRecord, run: RunRecord) -> list[Point]:
    if name.startswith("held_out/"):
        return held_out_points(name.removeprefix("held_out/"), stage, run)
    return [(stage.step_of(row), row[name]) for row in stage.rows if _is_number(row.get(name))]


def held_out_points(domain: str, stage: StageRecord, run: RunRecord) -> list[Point]:
    """The held-out pass rate over the stage's steps: what it started from, what was measured inside it, its end."""
    places = {stage.parent: 0, stage.name: stage.steps}
    inside = (label for label in run.scores if label.startswith(f"{stage.name}@"))
    places |= {label: int(label.rpartition("@")[2]) for label in inside}
    found = {place: run.scores.get(label, {}).get(domain) for label, place in places.items()}
    return sorted((place, score.pass_rate) for place, score in found.items() if score)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` of the points: the lowest and the highest of each of equally long sections, so that no spike
    is lost."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    for section in _sections(points, most // 2):
        low, high = min(section, key=lambda p: p[1]), max(section, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def _sections(items: Sequence, count: int) -> Iterable[Sequence]:
    borders = [len(items) * i // count for i in range(count + 1)]
    return (items[a:b] for a, b in pairwise(borders))


def _time_chart(stage: StageRecord) -> list[dict[str, Any]]:
    """Seconds of a step by phase, stacked; in a long stage each place is the mean of a section of steps."""
    recorded = dict.fromkeys(key for row in stage.rows for key in row if key.startswith("time/"))
    known = [f"time/{phase}" for phase in PHASES]
    names = [n for n in known if n in recorded] + [n for n in recorded if n not in (*known, NOT_A_PHASE)]
    if len(stage.rows) < 2 or not names:
        return []
    sections = list(_sections(stage.rows, min(len(stage.rows), MOST_POINTS // 2)))
    steps = [stage.step_of(section[-1]) for section in sections]
    series = [_series(name, [(x, _mean(s, name)) for x, s in zip(steps, sections, strict=True)]) for name in names]
    told = {
        "meaning": "Seconds of a step by phase, one above the other",
        "healthy": "rollout takes the larger part, sync under 10%",
    }
    return [{"title": "Time per phase", "unit": "seconds", "series": series, "stacked": True, **told}]


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row.get(name, 0.0) for row in rows) / len(rows)


def _series(name: str, points: Sequence[Point]) -> dict[str, Any]:
    return {"name": name, "x": [x for x, _ in points], "y": [rounded(y) for _, y in points]}


def rounded(value: float, digits: int = 5) -> float:
    """A number with as many significant digits as a curve shows."""
    return float(f"{value:.{digits}g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def comparison_default(stages: Sequence[StageRecord]) -> tuple[str, list[str]]:
    """The metric and the stages to lay over one another at first: siblings, which start from one checkpoint and share a
    domain, as MOPD and GRPO do that are to be compared; else all stages that sample; else all."""
    drawn = [stage for stage in stages if len(stage.rows) > 1]
    for stage in drawn:
        for domain in stage.domains:
            family = [s.name for s in drawn if s.parent == stage.parent and domain in s.domains]
            if len(family) > 1:
                return f"reward/{domain}", family
    sampling = [stage.name for stage in drawn if stage.domains]
    return ("reward/mean", sampling) if sampling else ("loss", [stage.name for stage in drawn])
