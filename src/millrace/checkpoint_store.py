"""The folder that holds a run's checkpoints: what is published, what is left over, what may go.

    DIR/step-00000012/            a published checkpoint: complete, checksummed, never changed again
    DIR/latest                    the name of the checkpoint a run resumes from; edit it to resume from another
    DIR/.step-00000012.tmp-...    one being written; found at a start, it is what a killed run left behind

A checkpoint is written aside, flushed to disk and renamed; then the pointer is replaced. A process may be killed
between any two of these lines: what `latest` names stays loadable. Nothing here knows tensors or ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from millrace.config.model_shape import ModelShape
from millrace.errors import MillraceError

FORMAT = 1
HF_FOLDER = "hf"
SHARDS = "shards"

FACTS = "millrace.json"
MANIFEST = "manifest.json"
POINTER = "latest"

_READ_BYTES = 4 << 20


class CheckpointError(MillraceError):
    """A checkpoint cannot be written or read; the message is one sentence with the way out."""


@dataclass(frozen=True)
class FileRecord:
    size: int
    crc32: int


def file_record(path: Path) -> FileRecord:
    """Size in bytes and CRC-32 of a file, read in pieces."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return FileRecord(size, crc)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a file and flush it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def checkpoint_facts(
    shape: ModelShape, layout: Mapping[str, Any] | None, *, step: int, policy_step: int, optimizer_step: int
) -> dict[str, Any]:
    """What a checkpoint says of itself. `layout` None: no ranks wrote it, so that it holds no random states."""
    return {
        "format": FORMAT,
        "step": step,
        "policy_step": policy_step,
        "optimizer_step": optimizer_step,
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "layout": layout,
        "model": comparable(shape),
        "versions": {package: version(package) for package in ("millrace", "megatron-core", "torch", "transformers")},
    }


def comparable(shape: ModelShape) -> dict[str, Any]:
    """The facts of a model as JSON gives them back."""
    facts: dict[str, Any] = json.loads(json.dumps(asdict(shape)))
    return facts


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_durably(path, json.dumps(value, indent=1) + "\n")


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Record size and checksum of every file; written last, so that it speaks of a complete folder."""
    write_json(folder / MANIFEST, {"files": {name: asdict(record) for name, record in sorted(records.items())}})


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when the file is absent or is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no complete checkpoint: it has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lists no files")
    return {name: FileRecord(int(entry["size"]), int(entry["crc32"])) for name, entry in files.items()}


def file_problem(folder: Path, name: str, expected: FileRecord) -> str | None:
    """What is wrong with one file of a checkpoint, or None."""
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected.size:
        return f"{path} has {size} bytes instead of {expected.size}: it was truncated or replaced"
    if file_record(path).crc32 != expected.crc32:
        return f"{path} has the right size but another checksum: its bytes were altered"
    return None


def readable_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class CheckpointStore:
    """One process works with this at a time: rank 0 of the run that owns the folder."""

    def __init__(self, directory: Path, keep: int) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep is {keep}: at least the newest checkpoint must stay, so 1 or more")
        self.directory = directory
        self.keep = keep

    def published(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        folders = [p for p in self.directory.iterdir() if not p.name.startswith(".") and (p / MANIFEST).is_file()]
        return sorted(folders, key=lambda p: (self._sequence(p), p.name))

    def latest(self) -> Path | None:
        """The checkpoint the pointer names; the newest one where the pointer was never written or names nothing."""
        pointer = self.directory / POINTER
        if pointer.is_file():
            named = self.directory / pointer.read_text(encoding="utf-8").strip()
            if named != self.directory and (named / MANIFEST).is_file():
                return named
        published = self.published()
        return published[-1] if published else None

    def next_sequence(self) -> int:
        """Checkpoints are numbered in the order they are written, since steps repeat after a resume."""
        return max((self._sequence(folder) for folder in self.published()), default=0) + 1

    def clean_up(self) -> list[str]:
        """Remove what a killed run left behind. Returns the names of what was removed or put back."""
        done = []
        for path in sorted(self.directory.glob(".*")) if self.directory.is_dir() else []:
            name, _, kind = path.name[1:].rpartition(".")
            original = self.directory / name
            if kind == "replaced" and not original.exists():
                path.rename(original)
            elif kind in ("replaced", "removed") or kind.startswith("tmp-"):
                remove(path)
            else:
                continue
            done.append(path.name)
        return done

    def require_space(self, needed: int, aside: Path | None = None) -> None:
        """Raises CheckpointError when fewer than `needed` bytes are free, counting what `aside` holds of them."""
        held = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()) if aside else 0
        free = shutil.disk_usage(self.directory).free + held
        if free < needed:
            raise CheckpointError(
                f"a checkpoint needs about {readable_bytes(needed)} in {self.directory}, but only "
                f"{readable_bytes(free)} are free: make room there, or lower checkpoint.keep"
            )

    def open_aside(self, name: str) -> Path:
        """An empty folder in which the checkpoint `name` is put together."""
        if name.startswith(".") or "/" in name or name == POINTER:
            raise CheckpointError(f"a checkpoint cannot be named {name!r}")
        aside = self.directory / f".{name}.tmp-{uuid.uuid4().hex[:8]}"
        aside.mkdir(parents=True)
        return aside

    def publish(self, aside: Path, name: str) -> Path:
        """Give a finished folder its name and point `latest` to it. One of that name is replaced."""
        for folder in [*(p for p in aside.rglob("*") if p.is_dir()), aside]:
            flush_to_disk(folder)
        final = self.directory / name
        replaced = self.directory / f".{name}.replaced"
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        flush_to_disk(self.directory)
        self.point_to(final)
        if replaced.exists():
            remove(replaced)
        return final

    def give_up(self, aside: Path, needed: int) -> None:
        """Remove a folder that could not be finished; raises CheckpointError when that was for want of space."""
        if not aside.exists():  # it was published, and what failed came after
            return
        try:
            self.require_space(needed, aside)
        finally:
            remove(aside)

    def retire(self) -> list[str]:
        """Remove all but the newest `keep` checkpoints; kept-for-good ones and what `latest` names stay."""
        pointed = self.latest()
        passing = [folder for folder in self.published() if not _facts(folder).get("keep_always", True)]
        retired = [folder for folder in passing[: -self.keep] if folder != pointed]
        for folder in retired:
            hidden = self.directory / f".{folder.name}.removed"
            folder.rename(hidden)
            remove(hidden)
        return [folder.name for folder in retired]

    def others(self, folder: Path) -> list[str]:
        """Names of the other checkpoints here, newest first."""
        return [other.name for other in reversed(self.published()) if other != folder]

    def _sequence(self, folder: Path) -> int:
        return int(_facts(folder).get("sequence", 0))

    def point_to_nothing(self) -> None:
        """Let a run begin anew, unless a checkpoint is published here."""
        (self.directory / POINTER).unlink(missing_ok=True)

    def point_to(self, folder: Path) -> None:
        """Let a run resume from this published checkpoint."""
        aside = self.directory / f".{POINTER}.tmp-pointer"
        write_durably(aside, folder.name + "\n")
        aside.replace(self.directory / POINTER)
        flush_to_disk(self.directory)


def _facts(folder: Path) -> dict[str, Any]:
    """Empty for a damaged checkpoint: it counts as the oldest, is never deleted, and `load` says what is wrong."""
    try:
        return read_json(folder / FACTS)
    except CheckpointError:
        return {}


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
