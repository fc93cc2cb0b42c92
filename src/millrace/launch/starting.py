"""What happens before the ranks of a run start: options checked, the ledger mended, a changed recipe explained, the run
taken back where it was asked to be. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from millrace.cascade.ledger import Ledger, standing
from millrace.cascade.rewind import is_rewound, reached, require_reached, require_stage, rewind, would_do
from millrace.config.changes import Change, change_lines
from millrace.config.errors import ConfigError
from millrace.config.schema import Recipe
from millrace.launch.run_dir import explain, record, recorded_recipe


@dataclass(frozen=True)
class Options:
    """How far a run should go, and what it may do to get there."""

    from_: str | None = None
    """Run this stage and all after it again."""
    until: str | None = None
    """The last stage to run now."""
    accept_changes: bool = False
    """Go on although changes of the recipe touch what the run has done."""


def start(recipe: Recipe, run_dir: Path, options: Options) -> list[str]:
    """Make the folder of a run ready for its ranks; returns what a person should be told, one line each.

    Raises ConfigError, with nothing written but a mended ledger, when the options or the recipe do not fit the run.
    """
    damage = Ledger(run_dir).recover()
    back, changes, told = _look(recipe, run_dir, options)
    if changes:
        facts = [{"key": one.key, "effect": one.effect, "change": change_lines([one])[0]} for one in changes]
        Ledger(run_dir).append("recipe_changed", changes=facts)
    if back is not None:
        told.append(rewind(recipe, run_dir, back))
    record(recipe, run_dir)
    return [damage, *told] if damage else told


def foresee(recipe: Recipe, run_dir: Path, options: Options) -> list[str]:
    """What `start` and the run behind it would do, one line each; nothing is written. Raises ConfigError likewise."""
    back, _, told = _look(recipe, run_dir, options)
    return [*told, *would_do(recipe, run_dir, back, options.until)]


def _look(recipe: Recipe, run_dir: Path, options: Options) -> tuple[str | None, list[Change], list[str]]:
    """The stage to go back to, if any; what differs from the recipe before; and the sentences about both."""
    _check_options(recipe, options)
    names, before, told = [stage.name for stage in recipe.stages], recorded_recipe(run_dir), []
    removed = [stage.name for stage in before.stages if stage.name not in names] if before else []
    events, back = Ledger(run_dir).events(), options.from_
    if back is not None and before == recipe and is_rewound(run_dir, back):
        told.append(f"the run was taken back to {back} before and goes on there")
        back = None
    rewound = [{"event": "rewound", "to": back}] if back else []
    done = standing([*events, *rewound], [*names, *removed])
    changes = explain(recipe, run_dir, options.accept_changes, begun=done.begun, finished=done.finished)
    if changes:
        told += ["the recipe has changed since the run last started:", *change_lines(changes)]
    if back is None:
        reached(recipe, run_dir)
    else:
        require_reached(recipe, run_dir, back)
    return back, changes, told


def _check_options(recipe: Recipe, options: Options) -> None:
    first = 0 if options.from_ is None else require_stage(recipe, options.from_, "--from")
    last = first if options.until is None else require_stage(recipe, options.until, "--until")
    if last < first:
        raise ConfigError(f"--until {options.until} comes before --from {options.from_}, so that nothing would run")
