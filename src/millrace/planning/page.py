"""The plan as one HTML page that needs nothing else: bars of memory for each role, and the timeline of a step.

The drawings are SVG from here, without scripts; colours and type are the report's stylesheet.
"""

from __future__ import annotations

from importlib import resources

from millrace.observe.report.texts import escaped
from millrace.planning.assumed import GIB
from millrace.planning.cluster_plan import ClusterPlan
from millrace.planning.estimate import StageEstimate
from millrace.planning.memory import Items, Role, gib_text

WIDTH = 1100
"""Of a drawing, in its own units; the page scales it."""
ROW = 44
COLOURS = 8
PHASES = {"rollout": 0, "score": 1, "train": 2, "sync": 3}


def plan_page(plan: ClusterPlan, text: str) -> str:
    """The whole page; `text` is the plan as the command prints it."""
    css = (resources.files("millrace.observe.report.assets") / "report.css").read_text(encoding="utf-8")
    title = f"{plan.recipe} on {plan.cluster}"
    state = "everything fits" if plan.fits else "does not fit"
    unfit = "".join(f"<p class='warning'>{escaped(str(one))}</p>" for one in plan.unfit)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escaped(title)} · Millrace plan</title>
<link rel="icon" href="data:,">
<style>{css}{_STYLE}</style>
</head>
<body>
<main>
<h1>{escaped(title)}</h1>
<p class="state{"" if plan.fits else " open"}">{plan.placement.nodes} nodes; {state}</p>
{unfit}
<h2>Memory</h2>{memory_bars(plan)}
<h2>A step of each stage</h2>{timelines(plan)}
<h2>The plan in words</h2><pre>{escaped(text)}</pre>
</main>
</body>
</html>
"""


_STYLE = """
pre { overflow-x: auto; font-size: .8rem; }
.plan svg { width: 100%; height: auto; display: block; }
.plan text { font-size: 12px; fill: var(--ink); } .plan .soft { fill: var(--soft); }
.plan .limit { stroke: var(--bad); stroke-width: 1.5; }
"""


def memory_bars(plan: ClusterPlan) -> str:
    """A bar for each role: what stands on its GPU, without one in memory, and a line where the GPU ends."""
    memory = plan.memory
    in_memory = [role.host if not memory.gpu_bytes or not role.device else {} for role in memory.roles]
    shown = [(role, role.device | host) for role, host in zip(memory.roles, in_memory, strict=True)]
    names = list(dict.fromkeys(name for _, items in shown for name in items))
    longest = max(memory.gpu_bytes, *(sum(items.values()) for _, items in shown), 1)
    scale = (WIDTH - 10) / longest
    rows = "".join(_bar(index, role, items, names, scale) for index, (role, items) in enumerate(shown))
    height = ROW * len(shown) + 20
    limit = ""
    if memory.gpu_bytes:
        x = memory.gpu_bytes * scale
        limit = (
            f"<line class='limit' x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height - 18}'/>"
            f"<text class='soft' x='{x:.1f}' y='{height - 4}' text-anchor='end'>"
            f"a GPU has {memory.gpu_bytes / GIB:.1f} GiB</text>"
        )
    label = "Bytes of each role, by what they are"
    svg = f"<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{label}'>{rows}{limit}</svg>"
    return f"<div class='plan'>{svg}</div>{_legend(names)}"


def _bar(index: int, role: Role, items: Items, names: list[str], scale: float) -> str:
    y, x = index * ROW, 0.0
    parts = [f"<text x='0' y='{y + 14}'>{escaped(role.name)} x {role.ranks}: {gib_text(sum(items.values()))}</text>"]
    for name in names:
        width = items.get(name, 0) * scale
        parts.append(_box(x, y + 20, width, names.index(name), f"{role.name}: {name} {gib_text(items.get(name, 0))}"))
        x += width
    return "".join(parts)


def timelines(plan: ClusterPlan) -> str:
    """One bar for each stage's synchronous step, all on one scale of seconds."""
    if not plan.estimates:
        return f"<p class='note'>No times: {escaped(plan.no_estimate)}</p>"
    longest = max(estimate.step_s for estimate in plan.estimates)
    rows = "".join(_timeline(index, one, (WIDTH - 10) / longest) for index, one in enumerate(plan.estimates))
    height = ROW * len(plan.estimates)
    svg = f"<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='Seconds of a step, by phase'>{rows}</svg>"
    return f"<div class='plan'>{svg}</div>{_legend(list(PHASES))}"


def _timeline(index: int, estimate: StageEstimate, scale: float) -> str:
    y, x = index * ROW, 0.0
    parts = [f"<text x='0' y='{y + 14}'>{escaped(estimate.stage)}: {estimate.step_s:.1f} s</text>"]
    for phase, seconds in estimate.phases.items():
        parts.append(_box(x, y + 20, seconds * scale, PHASES[phase], f"{estimate.stage}: {phase} {seconds:.1f} s"))
        x += seconds * scale
    return "".join(parts)


def _box(x: float, y: float, width: float, colour: int, title: str) -> str:
    fill = f"fill:var(--c{colour % COLOURS});opacity:{1 if colour < COLOURS else 0.55}"
    box = f"<rect x='{x:.1f}' y='{y}' width='{width:.1f}' height='16' style='{fill}'>"
    return f"{box}<title>{escaped(title)}</title></rect>" if width else ""


def _legend(names: list[str]) -> str:
    entries = []
    for index, name in enumerate(names):
        style = f"color:var(--c{index % COLOURS});opacity:{1 if index < COLOURS else 0.55}"
        entries.append(f"<span style='{style}'>■</span> {escaped(name)}")
    return f"<p class='note'>{' &nbsp; '.join(entries)}</p>"
