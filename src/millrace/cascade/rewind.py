"""Taking a run back to where one of its stages begins: `millrace run RECIPE --from STAGE`. Needs no torch.

Nothing is deleted: checkpoints and rollouts of the stages that will run again are moved to RUN_DIR/superseded. The
ledger is told first, so that after a kill in the middle no fact of what was taken back counts; the same command then
goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millrace.cascade.history import read_history
from millrace.cascade.ledger import Ledger
from millrace.cascade.outlook import outlook
from millrace.checkpoint_store import FACTS, CheckpointStore, read_json
from millrace.config.errors import ConfigError
from millrace.config.graph import nearest
from millrace.config.schema import Recipe

SUPERSEDED = "superseded"


def require_stage(recipe: Recipe, name: str, option: str) -> int:
    """The place of a stage in the recipe. Raises ConfigError with the nearest name."""
    names = [stage.name for stage in recipe.stages]
    if name not in names:
        raise ConfigError(f"{option} {name}: the recipe has no such stage{nearest(name, names)}")
    return names.index(name)


def is_rewound(run_dir: Path, name: str) -> bool:
    """Whether the run was taken back to `name` before and has not finished it since: then it is on its way there, and
    the same command (a job that is queued again) lets it go on."""
    last = None
    for event in Ledger(run_dir).events():
        if event["event"] == "rewound":
            last = event["to"]
        elif event["event"] == "stage_finished" and event["stage"] == last:
            last = None
    return last == name


def rewind(recipe: Recipe, run_dir: Path, name: str) -> str:
    """Let the run go on at the beginning of stage `name`; returns a sentence on what was moved where.

    Raises ConfigError for a stage that the run has not reached.
    """
    index = require_reached(recipe, run_dir, name)
    Ledger(run_dir).append("rewound", to=name)
    return _move_aside(recipe, run_dir, index)


def require_reached(recipe: Recipe, run_dir: Path, name: str) -> int:
    """The place of a stage that the run has come to. Raises ConfigError."""
    index = require_stage(recipe, name, "--from")
    names = [stage.name for stage in recipe.stages]
    finished = read_history(Ledger(run_dir).events(), names).finished
    if unfinished := [earlier for earlier in names[:index] if earlier not in finished]:
        raise ConfigError(
            f"--from {name}: {unfinished[0]}, which comes before it, is not finished in {run_dir}; run without --from"
        )
    return index


def require_same_stages(recipe: Recipe, state: Mapping[str, Any]) -> None:
    """What a checkpoint's run has begun must stand in the recipe as it was. Raises ConfigError."""
    begun = state["stages"][: state["stage"] + (state["step"] > 0)]
    now = [stage.name for stage in recipe.stages][: len(begun)]
    if now != begun:
        raise ConfigError(
            f"stages: the run's checkpoint has been through {', '.join(begun)}, but the recipe begins with "
            f"{', '.join(now) or 'nothing'}; name the same stages, or start afresh in another run_dir"
        )


def _move_aside(recipe: Recipe, run_dir: Path, index: int) -> str:
    store = CheckpointStore(run_dir / "checkpoints", recipe.checkpoint.keep)
    states = {folder: _state(folder) for folder in store.published()}
    kept = [folder for folder, state in states.items() if _is_before(state, index)]
    # The pointer moves first, then the newest checkpoint: a kill in between leaves the run as near as can be.
    if kept:
        store.point_to(max(kept, key=lambda folder: (states[folder]["stage"], states[folder]["step"])))
    else:
        store.point_to_nothing()
    moved = [folder for folder in reversed(states) if folder not in kept]
    moved += [folder for stage in recipe.stages[index:] if (folder := run_dir / "rollouts" / stage.name).is_dir()]
    target = _fresh_folder(run_dir / SUPERSEDED, recipe.stages[index].name)
    for folder in moved:
        place = target / folder.relative_to(run_dir)
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
    what = f"{len(moved)} folders of what was done since are in {target}" if moved else "nothing was done since"
    return f"back to the beginning of {recipe.stages[index].name}: {what}"


def _is_before(state: Mapping[str, Any], index: int) -> bool:
    """Whether a checkpoint was saved before the stage `index` made its first step."""
    return (state["stage"], state["step"]) <= (index, 0)


def _state(folder: Path) -> dict[str, Any]:
    return read_json(folder / FACTS)["state"]


def _fresh_folder(parent: Path, stage: str) -> Path:
    number = 1 + sum(1 for _ in parent.glob("*")) if parent.is_dir() else 1
    return parent / f"{number:02d}-from-{stage}"


def would_do(recipe: Recipe, run_dir: Path, from_: str | None, until: str | None) -> list[str]:
    """What `millrace run` would do with these options, one line a stage (see `outlook`)."""
    events = Ledger(run_dir).events()
    stage, step = reached(recipe, run_dir)
    if from_ is not None:
        stage, step = min((stage, step), (require_stage(recipe, from_, "--from"), 0))
        events.append({"event": "rewound", "to": from_})
    return outlook(recipe, read_history(events, [one.name for one in recipe.stages]), stage, step, until)


def reached(recipe: Recipe, run_dir: Path) -> tuple[int, int]:
    """Stage (index) and step at which the run's last checkpoint stands; the beginning where there is none.

    Raises ConfigError when the recipe does not have the stages that the run has been through.
    """
    latest = CheckpointStore(run_dir / "checkpoints", recipe.checkpoint.keep).latest()
    if latest is None:
        return 0, 0
    state = _state(latest)
    require_same_stages(recipe, state)
    return state["stage"], state["step"]
