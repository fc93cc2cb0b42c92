"""What a run has recorded, read into one object: the recipe, what counts of the ledger, the metrics.

Made for runs in any state. A run that was killed a moment ago, that has no metrics yet or whose last line is torn is
read as far as it goes; what could not be read at all is said in `notes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from millrace.config.errors import ConfigError
from millrace.config.graph import START, stage_graph
from millrace.config.loading import load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.schema import MopdStage, Recipe, SamplingStage, SftStage, StageConfig
from millrace.errors import MillraceError
from millrace.launch.run_dir import RECIPE, VERSIONS, is_locked
from millrace.observe.chain import Entry, first_problem, proven
from millrace.observe.entries import counted, stage_of
from millrace.observe.lines import read_lines

Event = Mapping[str, Any]
Row = Mapping[str, Any]
Status = Literal["waiting", "running", "interrupted", "done"]


class NoRun(MillraceError):
    """The folder holds nothing that a run records."""


@dataclass(frozen=True)
class Score:
    """A held-out pass rate."""

    pass_rate: float
    half_width: float
    """Half of its 95% interval."""
    prompts: int | None
    answers: int | None


@dataclass(frozen=True)
class StageRecord:
    """One stage: what the recipe says of it and what was recorded."""

    name: str
    type: str
    parent: str
    """Label of the checkpoint it starts from: `start`, a stage, or STAGE@STEP."""
    domains: tuple[str, ...]
    rules: Mapping[str, str]
    """Domain -> how the recipe chooses its teacher; empty but for MOPD."""
    teachers: Mapping[str, str]
    """Domain -> label of the checkpoint that was chosen; empty until the stage has started."""
    status: Status
    config: StageConfig | None
    """None where the recipe could not be read."""
    first_update: int
    """Updates of the policy before its first step."""
    finished: Event | None
    gate: Event | None
    rows: tuple[Row, ...]
    """Its metrics, in the order of the steps."""

    @property
    def updates_per_step(self) -> int:
        return getattr(self.config, "updates_per_batch", 1)

    @property
    def planned_steps(self) -> int | None:
        return self.config.steps if isinstance(self.config, SftStage | SamplingStage) else None

    @property
    def steps(self) -> int:
        """Steps on record."""
        return self.step_of(self.rows[-1]) if self.rows else 0

    def step_of(self, row: Row) -> int:
        """The step of the stage, counted from 1, that a row of metrics is about."""
        return max(1, round((row["step"] - self.first_update) / self.updates_per_step))


@dataclass(frozen=True)
class RunRecord:
    folder: Path
    recipe: Recipe | None
    versions: Mapping[str, str]
    shape: ModelShape | None
    """None where no config.json of the model was found."""
    events: tuple[Event, ...]
    """What the ledger proves, without what was rewound."""
    stages: tuple[StageRecord, ...]
    """In the order of the recipe."""
    state: str
    """One sentence."""
    running: bool
    notes: tuple[str, ...]
    """What could not be read."""

    @property
    def name(self) -> str:
        return self.recipe.name if self.recipe else self.folder.name

    @cached_property
    def scores(self) -> dict[str, dict[str, Score]]:
        """The stage-by-domain matrix: label -> domain -> held-out pass rate."""
        return {
            event["after"]: {domain: _score(score) for domain, score in event["scores"].items()}
            for event in self.events
            if event["event"] == "evaluated"
        }

    @property
    def domains(self) -> tuple[str, ...]:
        """Those of the recipe, then those that were measured besides."""
        measured = (domain for scores in self.scores.values() for domain in scores)
        return tuple(dict.fromkeys([*(self.recipe.domains if self.recipe else ()), *measured]))

    def stage(self, name: str) -> StageRecord | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def parent_of(self, label: str) -> str | None:
        """The label of the checkpoint that `label` was trained from; None for `start`."""
        stage = self.stage(stage_of(label))
        return stage.parent if stage else None


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder. Raises NoRun when there is nothing of a run in it."""
    if not any((folder / name).exists() for name in (RECIPE, "ledger.jsonl", "metrics.jsonl")):
        raise NoRun(f"{folder}: no run has written here (no {RECIPE}, no ledger); name the run_dir of a recipe")
    notes: list[str] = []
    recipe = _recipe(folder, notes)
    ledger = _ledger(folder / "ledger.jsonl", notes)
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "step" in row and "stage" in row]
    order = stage_names(recipe, ledger, rows)
    events = counted(ledger, order)
    running = is_locked(folder) and not _has_ended(events, folder)
    stages = tuple(_stage(name, order, recipe, events, rows, running) for name in order)
    return RunRecord(
        folder=folder,
        recipe=recipe,
        versions=_versions(folder),
        shape=_shape(folder, recipe, notes),
        events=tuple(events),
        stages=stages,
        state=state_sentence(events, stages, running),
        running=running,
        notes=tuple(notes),
    )


def stage_names(recipe: Recipe | None, events: Iterable[Event], rows: Iterable[Row]) -> list[str]:
    """The stages in the order in which they run."""
    planned = [stage.name for stage in recipe.stages] if recipe else []
    started = [event["stage"] for event in events if event["event"] == "stage_started"]
    return list(dict.fromkeys([*planned, *started, *(row["stage"] for row in rows)]))


def state_sentence(events: Sequence[Event], stages: Sequence[StageRecord], running: bool) -> str:
    """Finished, stopped, running or interrupted, and where."""
    if events and events[-1]["event"] == "finished":
        return "finished"
    place = _place(stages)
    if running:
        return f"running{place}"
    gates = [event for event in events if event["event"] == "gate" and event.get("action") == "stop"]
    if gates and gates[-1] in events[-2:]:
        return f"stopped by the gate of {gates[-1]['stage']}"
    if events and events[-1]["event"] == "stopped":
        return f"stopped as asked{place}"
    return f"interrupted{place}" if place else "not begun"


def _place(stages: Sequence[StageRecord]) -> str:
    here = next((stage for stage in stages if stage.status in ("running", "interrupted")), None)
    if here is None:
        done = [stage.name for stage in stages if stage.status == "done"]
        return f" after stage {done[-1]}" if done else ""
    planned = f" of {here.planned_steps}" if here.planned_steps else ""
    return f" at stage {here.name}, step {here.steps}{planned}"


def _has_ended(events: Sequence[Event], folder: Path) -> bool:
    """Whether the last event ends the run, and nothing has been written since by one that was resumed."""
    if not events or events[-1]["event"] not in ("finished", "stopped"):
        return False
    metrics = folder / "metrics.jsonl"
    return not metrics.exists() or metrics.stat().st_mtime <= events[-1].get("time", 0) + 1


def _recipe(folder: Path, notes: list[str]) -> Recipe | None:
    try:
        return load_recipe(folder / RECIPE)
    except ConfigError as error:
        notes.append(f"The recipe could not be read, so what it alone knows is missing here: {error.problems[0]}")
        return None


def _ledger(path: Path, notes: list[str]) -> Sequence[Entry]:
    """The entries that the run itself would go on from."""
    content = path.read_bytes() if path.exists() else b""
    known = proven(content)
    if known.size < len(content):
        notes.append(f"{path.name}: {first_problem(content, known)}, so it and all behind it count no more.")
    return known.entries


def _versions(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / VERSIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _shape(folder: Path, recipe: Recipe | None, notes: list[str]) -> ModelShape | None:
    for place in model_folders(folder, recipe):
        try:
            return ModelShape.from_hf(place)
        except ConfigError:
            continue
    notes.append("No config.json of the model was found, so its size is not known.")
    return None


def model_folders(folder: Path, recipe: Recipe | None) -> list[Path]:
    """Where a config.json and a tokenizer of the model may lie, the recipe's own first."""
    own = [Path(recipe.model.path)] if recipe else []
    return [*own, folder / "export", *sorted(folder.glob("checkpoints/*/hf"))]


def _score(score: Mapping[str, Any]) -> Score:
    return Score(score["pass_rate"], score["half_width"], score.get("prompts"), score.get("answers"))


def _stage(
    name: str, order: Sequence[str], recipe: Recipe | None, events: Sequence[Event], rows: Sequence[Row], running: bool
) -> StageRecord:
    config = next((stage for stage in recipe.stages if stage.name == name), None) if recipe else None
    started = _last(events, "stage_started", name)
    finished = _last(events, "stage_finished", name)
    own = _counted([row for row in rows if row["stage"] == name], started)
    first = started["step"] if started and "step" in started else own[0]["step"] - 1 if own else 0
    return StageRecord(
        name=name,
        type=config.type if config else (started or {}).get("type", "rl"),
        parent=_parent(name, order, recipe, started),
        domains=_domains(config, own),
        rules=config.teachers if isinstance(config, MopdStage) else {},
        teachers=(started or {}).get("teachers") or {},
        status=_status(started, finished, own, running),
        config=config,
        first_update=first,
        finished=finished,
        gate=_last(events, "gate", name),
        rows=tuple(own),
    )


def _last(events: Sequence[Event], kind: str, stage: str) -> Event | None:
    return next((e for e in reversed(events) if e["event"] == kind and e.get("stage") == stage), None)


def _counted(rows: Sequence[Row], started: Event | None) -> list[Row]:
    """The rows of the stage as it was run last, each step once, in order."""
    by_step = {row["step"]: row for row in rows}
    first = started["step"] if started and "step" in started else -1
    return [by_step[step] for step in sorted(by_step) if step > first]


def _parent(name: str, order: Sequence[str], recipe: Recipe | None, started: Event | None) -> str:
    if started and started.get("parent"):
        return started["parent"]
    parents = stage_graph(recipe.stages).parents if recipe else {}
    place = order.index(name)
    return parents.get(name) or (order[place - 1] if place else START)


def _domains(config: StageConfig | None, rows: Sequence[Row]) -> tuple[str, ...]:
    if config is not None:
        return config.domains if isinstance(config, SamplingStage) else ()
    not_domains = {"mean", "length", "overlong", "solved"}
    names = (key.removeprefix("reward/") for row in rows for key in row if key.startswith("reward/"))
    return tuple(dict.fromkeys(name for name in names if name not in not_domains))


def _status(started: Event | None, finished: Event | None, rows: Sequence[Row], running: bool) -> Status:
    if finished:
        return "done"
    if started or rows:
        return "running" if running else "interrupted"
    return "waiting"
