"""The stage-by-domain matrix: held-out pass rates, each compared with the checkpoint its own was trained from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from millrace.config.graph import START
from millrace.observe.entries import stage_of
from millrace.observe.report.record import Event, RunRecord, Score, StageRecord
from millrace.observe.report.texts import escaped, percent, points

Direction = Literal["gain", "drop", "same"]


@dataclass(frozen=True)
class Cell:
    score: Score
    change: float | None
    """Against the parent's row; None in the first row, and where the parent was not measured."""
    change_half_width: float
    """Half of the 95% interval of the change, as of two independent measurements. Both rows answer the same prompts, so
    the true one is narrower."""
    trained: bool
    """Whether the row's stage trains on this domain."""
    teacher: str | None
    """The checkpoint that taught the row's stage on this domain."""
    to_teacher: float | None
    """Pass rate minus the teacher's."""

    @property
    def direction(self) -> Direction:
        if self.change is None or abs(self.change) < 5e-4:
            return "same"
        return "gain" if self.change > 0 else "drop"

    @property
    def certain(self) -> bool:
        """Whether 0 lies outside the interval of the change."""
        return self.change is not None and abs(self.change) > self.change_half_width


@dataclass(frozen=True)
class MatrixRow:
    label: str
    parent: str | None
    inside: bool
    """Measured inside a stage (STAGE@STEP), not at its end."""
    cells: Mapping[str, Cell]


def matrix_rows(run: RunRecord) -> list[MatrixRow]:
    """`start`, then each stage in the recipe's order with what was measured inside it before its end."""
    return [_row(label, run) for label in _labels(run)]


def _labels(run: RunRecord) -> Iterator[str]:
    if START in run.scores:
        yield START
    for stage in run.stages:
        inside = [label for label in run.scores if label.startswith(f"{stage.name}@")]
        yield from sorted(inside, key=lambda label: int(label.rpartition("@")[2]))
        if stage.name in run.scores:
            yield stage.name


def _row(label: str, run: RunRecord) -> MatrixRow:
    parent, stage = run.parent_of(label), run.stage(stage_of(label))
    before = run.scores.get(parent, {}) if parent else {}
    cells = {
        domain: _cell(score, before.get(domain), domain, stage, run) for domain, score in run.scores[label].items()
    }
    return MatrixRow(label, parent, "@" in label, cells)


def _cell(score: Score, before: Score | None, domain: str, stage: StageRecord | None, run: RunRecord) -> Cell:
    teacher = stage.teachers.get(domain) if stage else None
    taught = run.scores.get(teacher, {}).get(domain) if teacher else None
    return Cell(
        score=score,
        change=score.pass_rate - before.pass_rate if before else None,
        change_half_width=math.hypot(score.half_width, before.half_width) if before else 0.0,
        trained=bool(stage and domain in stage.domains),
        teacher=teacher,
        to_teacher=score.pass_rate - taught.pass_rate if taught else None,
    )


def matrix_html(run: RunRecord) -> str:
    rows = matrix_rows(run)
    if not rows:
        return "<p class='empty'>No held-out set has been measured yet.</p>"
    pinned = {label for stage in run.stages for label in stage.teachers.values()}
    pinned |= {str(stage.gate["result"]) for stage in run.stages if stage.gate and "result" in stage.gate}
    hidden = [row for row in rows if row.inside and row.label not in pinned]
    head = "".join(f"<th scope='col'>{escaped(domain)}</th>" for domain in run.domains)
    body = "".join(_row_html(row, run.domains, hide=row in hidden) for row in rows)
    switch = (
        "<label class='switch'><input type='checkbox' id='show-inside'> "
        f"Show the {len(hidden)} measurements inside stages</label>"
        if hidden
        else ""
    )
    return (
        f"{switch}<div class='scroll' tabindex='0' role='region' aria-label='Matrix of stages by domains'>"
        f"<table class='matrix'><thead><tr><th scope='col'>after</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"</div>{_LEGEND}"
    )


_LEGEND = (
    "<p class='note'>Held-out pass rate ± half of its 95% interval; the bar spans 0 to 100%, its whisker the interval. "
    "Below: the change in points against the checkpoint that the row started from, "
    "<span class='drop certain'>▼ a drop beyond its 95% interval</span>, <span class='drop'>▼ a drop within it</span>, "
    "<span class='gain'>▲ a gain</span>. Domains that the stage trains on are marked <b class='own'>●</b>.</p>"
)


def _row_html(row: MatrixRow, domains: Sequence[str], hide: bool) -> str:
    origin = f"<span class='from'>from {escaped(row.parent)}</span>" if row.parent else ""
    cells = "".join(f"<td>{_cell_html(row.cells[d]) if d in row.cells else ''}</td>" for d in domains)
    kind = " class='inside' hidden" if hide else " class='inside'" if row.inside else ""
    return f"<tr{kind}><th scope='row'>{escaped(row.label)}{origin}</th>{cells}</tr>"


def _cell_html(cell: Cell) -> str:
    own = " <b class='own' title='trained here'>●</b>" if cell.trained else ""
    value = f"<span class='value'>{percent(cell.score.pass_rate)}</span> {_half_width(cell.score)}{own}"
    teacher = ""
    if cell.to_teacher is not None:
        teacher = f"<span class='teacher'>{points(cell.to_teacher)} to {escaped(cell.teacher)}</span>"
    return f"{value}{_bar(cell.score)}{change_html(cell)}{teacher}"


def _half_width(score: Score) -> str:
    counted = f" title='{score.prompts} prompts, {score.answers} answers'" if score.prompts else ""
    return f"<span class='interval'{counted}>±{100 * score.half_width:.1f}</span>"


def change_html(cell: Cell) -> str:
    """The change with its sign and an arrow; nothing where there is nothing to compare with."""
    if cell.change is None:
        return ""
    arrow = {"gain": "▲", "drop": "▼", "same": "="}[cell.direction]
    classes = f"change {cell.direction}{' certain' if cell.certain else ''}"
    return f"<span class='{classes}'>{arrow} {points(cell.change)}</span>"


def _bar(score: Score) -> str:
    value = 100 * score.pass_rate
    low, high = max(0.0, value - 100 * score.half_width), min(100.0, value + 100 * score.half_width)
    return (
        f"<span class='bar' aria-hidden='true'><i style='width:{value:.1f}%'></i>"
        f"<s style='left:{low:.1f}%;width:{high - low:.1f}%'></s></span>"
    )


def verdicts_html(run: RunRecord) -> str:
    """The gates' sentences, and where each teacher came from."""
    gates = [stage.gate for stage in run.stages if stage.gate]
    teachers = [stage for stage in run.stages if stage.teachers]
    parts = []
    if gates:
        parts.append(f"<h3>Gates</h3><ul class='verdicts'>{''.join(map(_verdict, gates))}</ul>")
    if teachers:
        lines = "".join(_teacher_line(stage, domain, run) for stage in teachers for domain in stage.teachers)
        parts.append(f"<h3>Teachers</h3><ul class='verdicts'>{lines}</ul>")
    return "".join(parts)


OUTCOMES = {
    "stop": "failed: the run was stopped",
    "warn": "failed: the run went on with a warning",
    "back": "failed: later stages start from an earlier checkpoint",
}


def outcome(gate: Event) -> str:
    """What a gate decided, in a few words."""
    return "passed" if gate.get("passed") else OUTCOMES.get(str(gate.get("action")), "failed")


def _verdict(gate: Event) -> str:
    passed = bool(gate.get("passed"))
    kind, mark = ("good", "✓") if passed else ("bad", "✕")
    checks = "".join(_check(check) for check in gate.get("checks", ()))
    listed = f"<ul class='checks'>{checks}</ul>" if checks else ""
    back = f" ({escaped(gate['result'])})" if gate.get("action") == "back" and gate.get("result") else ""
    return (
        f"<li><b class='{kind}'>{mark} {escaped(gate['stage'])}</b> {outcome(gate)}{back}. "
        f"{escaped(gate.get('reason', ''))}{listed}</li>"
    )


def _check(check: Mapping) -> str:
    mark = "✓" if check["passed"] else "✕"
    asked = f"at least +{check['limit']:g}" if check["kind"] == "gain" else f"no drop beyond {check['limit']:g}"
    change = f"{check['change']:+.1f}".replace("-", "−")
    return f"<li>{mark} {escaped(check['domain'])} {change} ±{check['half_width']:.1f} points, {asked}</li>"


def _teacher_line(stage: StageRecord, domain: str, run: RunRecord) -> str:
    label, rule = stage.teachers[domain], stage.rules.get(domain)
    score = run.scores.get(label, {}).get(domain)
    why = f", chosen by {escaped(rule)}" if rule else ""
    how_good = f", {percent(score.pass_rate)} there" if score else ""
    return (
        f"<li><b>{escaped(stage.name)}</b> learns {escaped(domain)} from <b>{escaped(label)}</b>{why}{how_good}.</li>"
    )
