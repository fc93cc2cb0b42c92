"""The page: head, graph, matrix, curves, efficiency and rollouts, in one HTML file that needs nothing else.

Tables and the graph are HTML from here and can be read without scripts; curves and the rollout viewer are drawn by
`assets/` from data embedded as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from millrace.observe.report.curves import curve_data
from millrace.observe.report.efficiency import DEFINITION, Cost, costs, total_cost
from millrace.observe.report.graph import graph_html
from millrace.observe.report.matrix import matrix_html, verdicts_html
from millrace.observe.report.record import RunRecord
from millrace.observe.report.rollouts import rollout_data
from millrace.observe.report.texts import duration, escaped, moment, short_number

SECTIONS = (
    ("graph", "Stages"),
    ("matrix", "Matrix"),
    ("curves", "Curves"),
    ("efficiency", "Efficiency"),
    ("rollouts", "Rollouts"),
)
SCRIPTS = ("chart.js", "curves.js", "rollouts.js")


def render_page(run: RunRecord) -> str:
    """The whole report as HTML."""
    links = "".join(f"<a href='#{anchor}'>{title}</a>" for anchor, title in SECTIONS)
    scripts = "\n".join(_asset(name) for name in SCRIPTS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escaped(run.name)} · Millrace report</title>
<link rel="icon" href="data:,">
<style>{_asset("report.css")}</style>
<script>{_asset("theme.js")}</script>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header class="bar-top"><nav aria-label="Sections"><b>{escaped(run.name)}</b>{links}</nav>
<button type="button" id="theme" aria-label="Colours: as the system">◐ auto</button></header>
<main id="main">
{head_html(run)}
<section id="graph"><h2>Stages</h2>{graph_html(run)}</section>
<section id="matrix"><h2>Stages by domains</h2>{matrix_html(run)}{verdicts_html(run)}</section>
<section id="curves"><h2>Curves</h2>{_CURVES}</section>
<section id="efficiency"><h2>Efficiency</h2>{efficiency_html(run)}</section>
<section id="rollouts"><h2>Rollouts</h2>{_ROLLOUTS}</section>
</main>
<div id="tip" role="status" aria-live="polite" hidden></div>
{embedded("curve-data", curve_data(run))}
{embedded("rollout-data", rollout_data(run))}
<script>
{scripts}
</script>
</body>
</html>
"""


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""Nothing is loaded from anywhere, whatever an answer of the model may say."""

_CURVES = """
<noscript><p class="empty">The curves are drawn by a script, and scripts are switched off here.</p></noscript>
<h3 id="compare-title">Stages over one another</h3>
<form id="compare" aria-labelledby="compare-title">
<label>Metric <select id="compare-metric"></select></label>
<fieldset><legend>Stages, over the steps of each</legend><div id="compare-stages"></div></fieldset>
</form>
<div id="compare-chart" class="chart big"></div>
<div id="stage-curves"></div>
<p class="note">A chart stands where at least two values of its metric are on record: a stage without one does not
measure it (SFT has no rewards), or has not come so far. A – beside a name says that nothing was measured at that step.
</p>
"""

_ROLLOUTS = """
<noscript><p class="empty">Rollouts are shown by a script, and scripts are switched off here.</p></noscript>
<form id="viewer" aria-label="Which rollouts to show">
<label>Stage <select id="v-stage"></select></label>
<label>Step <select id="v-step"></select></label>
<label>Domain <select id="v-domain"></select></label>
<label>Answers <select id="v-verdict"><option value="">all</option><option value="right">right (reward ≥ 1)</option>
<option value="wrong">wrong (reward &lt; 1)</option></select></label>
<label class="grow">Prompt <select id="v-group"></select></label>
<label>Colour <select id="v-colour"></select></label>
</form>
<div id="v-legend" class="legend"></div>
<div id="v-answers"></div>
<p class="note" id="v-note"></p>
"""


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def embedded(name: str, data: Any) -> str:
    """Data as a JSON block that no text inside it can close."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, code in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(character, code)
    return f'<script type="application/json" id="{name}">{text}</script>'


def head_html(run: RunRecord) -> str:
    """Name, state, when, model and versions."""
    facts = "".join(
        f"<div><dt>{escaped(term)}</dt><dd>{escaped(value)}</dd></div>" for term, value in _facts(run).items()
    )
    versions = " · ".join(f"{name} {version}" for name, version in run.versions.items())
    notes = "".join(f"<p class='warning'>{escaped(note)}</p>" for note in run.notes)
    return (
        f"<h1>{escaped(run.name)}</h1><p class='state {_kind(run)}'>{escaped(run.state)}</p>"
        f"<dl class='facts'>{facts}</dl><p class='note'>{escaped(versions)}</p>{notes}"
    )


def _kind(run: RunRecord) -> str:
    return "running" if run.running else "good" if run.state == "finished" else "open"


def _facts(run: RunRecord) -> Mapping[str, str]:
    facts: dict[str, str] = {}
    times = [event["time"] for event in run.events if "time" in event]
    if times:
        facts["Began"] = moment(times[0])
        facts["Last entry"] = f"{moment(times[-1])} ({duration(times[-1] - times[0])} later)"
    if run.recipe:
        facts["Seed"] = str(run.recipe.seed)
        facts["Model"] = f"{run.recipe.model.path}, {run.recipe.model.dtype}"
    if run.shape:
        total, active = run.shape.parameter_count(), run.shape.active_parameter_count()
        facts["Parameters"] = f"{short_number(total)}, {short_number(active)} active for a token"
        facts["Family"] = run.shape.family
    facts["Folder"] = str(run.folder)
    return facts


def efficiency_html(run: RunRecord) -> str:
    """What each stage spent, and what a solved answer cost in it."""
    spent = costs(run)
    if not spent:
        return "<p class='empty'>No stage has begun.</p>"
    body = "".join(_cost_row(name, cost) for name, cost in spent.items())
    if len(spent) > 1:
        body += _cost_row("whole run", total_cost(list(spent.values())), "total")
    return (
        "<div class='scroll' tabindex='0' role='region' aria-label='Efficiency by stage'><table class='costs'><thead>"
        "<tr><th rowspan='2' scope='col'>stage</th><th colspan='4' scope='colgroup'>spent</th>"
        "<th rowspan='2' scope='col'>solved<br>answers</th><th colspan='3' scope='colgroup'>per solved answer</th></tr>"
        "<tr><th scope='col'>time</th><th scope='col'>tokens trained</th><th scope='col'>tokens sampled</th>"
        "<th scope='col'>FLOPs</th>"
        "<th scope='col'>tokens sampled</th><th scope='col'>FLOPs</th><th scope='col'>seconds</th>"
        f"</tr></thead><tbody>{body}</tbody></table></div><p class='note'>{DEFINITION}{_active_note(run)}</p>"
    )


def _cost_row(name: str, cost: Cost, kind: str = "") -> str:
    cells = [
        duration(cost.seconds),
        short_number(cost.tokens_trained),
        short_number(cost.tokens_sampled),
        short_number(cost.flops),
        short_number(cost.solved),
        short_number(cost.per_solved(cost.tokens_sampled)),
        short_number(cost.per_solved(cost.flops)),
        short_number(cost.per_solved(cost.seconds)),
    ]
    return (
        f"<tr class='{kind}'><th scope='row'>{escaped(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    )


def _active_note(run: RunRecord) -> str:
    if run.shape is None:
        return ""
    total, active = run.shape.parameter_count(), run.shape.active_parameter_count()
    share = f"{short_number(active)} of the model's {short_number(total)} parameters ({100 * active / total:.0f}%)"
    return f" FLOPs count the parameters that a token meets: {share}."
