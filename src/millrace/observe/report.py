"""RUN_DIR/report.html: what a run did, for people who would rather look than read. One file, no network, no script."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from millrace.observe.metrics import METRICS, format_value
from millrace.observe.writer import read_metrics

CURVES = ("loss", "reward/mean", "reward/length", "entropy", "grad_norm", "mismatch/mean", "groups/without_variance")
"""Metrics that get a curve, in this order, where a stage has them."""

SHOWN_ANSWERS = 6
"""Answers shown from the first and the last recorded step of each RL stage."""

STYLE = """
:root { color-scheme: light dark; --line: #2563eb; --grid: #8884; --good: #16a34a; --bad: #dc2626; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr + tr td { border-top: 1px solid var(--grid); }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; } figcaption { font-size: 13px; }
svg { display: block; } .up { color: var(--good); } .down { color: var(--bad); }
.quiet { opacity: .65; font-size: 13px; }
pre { white-space: pre-wrap; margin: 0; }
.answer { border-left: 3px solid var(--grid); padding: .2rem .8rem; margin: .6rem 0; }
"""


def write_report(run_dir: Path) -> Path:
    """Write the report of what a run has recorded so far and return its path."""
    events = _read_lines(run_dir / "ledger.jsonl")
    rows = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    body = [f"<h1>{html.escape(run_dir.name)}</h1>", _matrix(events)]
    for stage in stages:
        body.append(f"<h2>{html.escape(stage)}</h2>")
        body.append(_curves([row for row in rows if row["stage"] == stage]))
        body.append(_answers(run_dir / "rollouts" / stage))
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(run_dir.name)}</title>"
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>"
    )
    path = run_dir / "report.html"
    aside = path.with_suffix(".html.tmp")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path


def _read_lines(path: Path) -> list[dict]:
    return read_metrics(path) if path.exists() else []


def _matrix(events: Sequence[Mapping]) -> str:
    """The stage-by-domain table; each cell says how far it moved since the row above."""
    measured = [event for event in events if event["event"] == "evaluated"]
    if not measured:
        return ""
    domains = list(dict.fromkeys(domain for event in measured for domain in event["scores"]))
    head = "".join(f"<th>{html.escape(domain)}</th>" for domain in domains)
    lines: list[str] = []
    before: Mapping[str, Mapping] = {}
    for event in measured:
        cells = "".join(f"<td>{_cell(event['scores'].get(d), before.get(d))}</td>" for d in domains)
        lines.append(f"<tr><td>{html.escape(event['after'])}</td>{cells}</tr>")
        before = event["scores"]
    note = "<p class='quiet'>Held-out pass rate after each stage, 95% interval, change in points.</p>"
    return f"<table><tr><th>after</th>{head}</tr>{''.join(lines)}</table>{note}"


def _cell(score: Mapping | None, before: Mapping | None) -> str:
    if score is None:
        return ""
    text = f"{100 * score['pass_rate']:.1f}% <span class='quiet'>±{100 * score['half_width']:.1f}</span>"
    if before is None:
        return text
    change = 100 * (score["pass_rate"] - before["pass_rate"])
    direction = "quiet" if abs(change) < 0.05 else "up" if change > 0 else "down"
    return f"{text} <span class='{direction}'>{change:+.1f}</span>"


def _curves(rows: Sequence[Mapping]) -> str:
    figures = []
    for name in CURVES:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if len(points) > 1:
            meaning = METRICS[name].meaning if name in METRICS else ""
            caption = f"<b>{name}</b> {format_value(name, points[-1][1])}"
            figures.append(
                f"<figure title='{html.escape(meaning, quote=True)}'><figcaption>{caption}</figcaption>"
                f"{_svg(points)}</figure>"
            )
    return "".join(figures)


def _svg(points: Sequence[tuple[float, float]], width: int = 320, height: int = 120) -> str:
    """A line chart of (step, value) with its range written at the axis."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    span_x, span_y = (max(xs) - min(xs)) or 1, (high - low) or 1
    left, top, bottom = 58, 8, 18
    place = [
        (
            left + (x - xs[0]) / span_x * (width - left - 6),
            height - bottom - (y - low) / span_y * (height - top - bottom),
        )
        for x, y in points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    label = "font-size='11' fill='currentColor' opacity='.7'"
    base = height - bottom
    return (
        f"<svg width='{width}' height='{height}' role='img'>"
        f"<path d='M{left} {top}V{base}H{width - 6}' fill='none' stroke='currentColor' opacity='.3'/>"
        f"<text x='{left - 5}' y='{top + 8}' text-anchor='end' {label}>{high:.3g}</text>"
        f"<text x='{left - 5}' y='{base}' text-anchor='end' {label}>{low:.3g}</text>"
        f"<text x='{left}' y='{height - 4}' {label}>{xs[0]}</text>"
        f"<text x='{width - 6}' y='{height - 4}' text-anchor='end' {label}>{xs[-1]}</text>"
        f"<polyline points='{path}' fill='none' stroke='var(--line)' stroke-width='1.6'/></svg>"
    )


def _answers(folder: Path) -> str:
    """A few answers of the first and the last recorded step, side by side with their rewards."""
    files = sorted(folder.glob("step-*.jsonl")) if folder.exists() else []
    parts = []
    for file in [files[0], files[-1]] if len(files) > 1 else files:
        parts.append(f"<h3>answers at {html.escape(file.stem)}</h3>")
        parts += [_answer(json.loads(line)) for line in _every_nth(file.read_text(encoding="utf-8").splitlines()[1:])]
    return "".join(parts)


def _every_nth(lines: Sequence[str]) -> Sequence[str]:
    return lines[:: max(1, len(lines) // SHOWN_ANSWERS)][:SHOWN_ANSWERS]


def _answer(line: Mapping) -> str:
    asked = html.escape(line["messages"][-1]["content"])
    colour = "up" if line["reward"] > 0 else "down"
    return (
        f"<div class='answer'><span class='quiet'>{asked}</span><pre>{html.escape(line['answer'])}</pre>"
        f"<span class='{colour}'>{line['reward']:g}</span> "
        f"<span class='quiet'>{html.escape(line['reason'])}, {len(line['answer_tokens'])} tokens, "
        f"{line['finish_reason']}</span></div>"
    )
