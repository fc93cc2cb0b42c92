"""What opening conversations finds out, kept in a file: rendering millions of them takes hours, reading this seconds.

The file is taken only while all that it was made of is as it was. Two lines come first, the SHA-256 of all that
follows and a JSON object, and behind them the columns.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from millrace.data.tokenizer import ChatTokenizer

FORMAT = 1

LIBRARIES = ("jinja2", "tokenizers", "transformers")
"""What renders and tokenises besides this package."""

TOKENIZER_SUFFIXES = (".jinja", ".json", ".model", ".tiktoken", ".txt", ".vocab")
"""Of the files of a checkpoint's folder that a tokenizer may be made of."""

Stamp = tuple[int, int]
"""Size of a file and time of its last change: a rewritten one has other rows at the remembered places."""

log = logging.getLogger("millrace.data")


@dataclass(frozen=True)
class Places:
    """Where the rows of a JSONL file are, as long as it has this stamp."""

    stamp: Stamp
    starts: array[int]
    """Byte at which each row begins."""
    lines: array[int]
    """Number of its line, from 1."""


@dataclass(frozen=True)
class Learnt:
    """What opening finds out about conversations, whatever the longest sequence may be."""

    places: Sequence[Places]
    """Of each file."""
    parts: array[int] = field(default_factory=lambda: array("I"))
    """Training sequences of each row, through all files."""
    lengths: array[int] = field(default_factory=lambda: array("I"))
    """Tokens of each of these."""

    def add(self, lengths: Sequence[int]) -> Sequence[int]:
        """Learn the lengths of the next row's sequences; returns them."""
        self.parts.append(len(lengths))
        self.lengths.extend(lengths)
        return lengths

    def rows(self) -> Iterator[Sequence[int]]:
        """Lengths of the sequences of each row."""
        start = 0
        for parts in self.parts:
            yield self.lengths[start : start + parts]
            start += parts


class KeptIndex:
    """The file `path` for conversations that are rendered by `tokenizer`, in the form `thinking` where a row says none.

    A file that is missing, torn or made of anything else counts as none.
    """

    def __init__(self, path: Path, tokenizer: ChatTokenizer, thinking: bool | None) -> None:
        self.path = path
        self._rendering = {
            "format": FORMAT,
            "libraries": {name: version(name) for name in LIBRARIES},
            "code": _files_digest(Path(__file__).parent, (".py",)),
            "tokenizer": _files_digest(tokenizer.path, TOKENIZER_SUFFIXES),
            "chat_template": tokenizer.chat_template,
            "thinking": thinking,
        }

    def read(self, files: Sequence[Path]) -> Learnt | None:
        """What was found out about these files as they are now; None when that is not known."""
        try:
            stamps = [_stamp_of(file) for file in files]
            with self.path.open("rb") as kept:
                digest, head = kept.readline().strip(), kept.readline()
                facts = json.loads(head)
                sizes = facts["rows"], facts["sequences"]
                if facts != self._facts(files, stamps, *sizes):
                    return None
                columns = _columns(*sizes)
                if os.fstat(kept.fileno()).st_size != kept.tell() + sum(n * column.itemsize for column, n in columns):
                    return None
                for column, size in columns:
                    column.fromfile(kept, size)
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None
        *placed, parts, lengths = (column for column, _ in columns)
        if digest != _digest(head, [*placed, parts, lengths]):
            return None
        places = [Places(*of) for of in zip(stamps, placed[::2], placed[1::2], strict=True)]
        return Learnt(places, parts, lengths)

    def write(self, files: Sequence[Path], learnt: Learnt) -> None:
        """Keep it for the next start, aside first. A file that cannot be written is told, and no error."""
        rows = [len(places.starts) for places in learnt.places]
        stamps = [places.stamp for places in learnt.places]
        head = json.dumps(self._facts(files, stamps, rows, len(learnt.lengths))).encode() + b"\n"
        columns = [*chain.from_iterable((p.starts, p.lines) for p in learnt.places), learnt.parts, learnt.lengths]
        aside = self.path.with_name(self.path.name + ".tmp")
        try:
            self.path.parent.mkdir(exist_ok=True)
            with aside.open("wb") as file:
                file.write(_digest(head, columns) + b"\n" + head)
                for column in columns:
                    column.tofile(file)
            os.replace(aside, self.path)
        except OSError as error:
            log.warning(
                f"{self.path}: what was read of the conversations cannot be kept ({error.strerror}), so the next start "
                "renders them all again"
            )
            with suppress(OSError):
                aside.unlink()

    def _facts(self, files: Sequence[Path], stamps: Sequence[Stamp], rows: list[int], sequences: int) -> dict[str, Any]:
        """All that the columns depend on, and their sizes, as JSON has it."""
        made_of = [[str(file.absolute()), *stamp] for file, stamp in zip(files, stamps, strict=True)]
        return {**self._rendering, "files": made_of, "rows": rows, "sequences": sequences}


def stamp(descriptor: int) -> Stamp:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _stamp_of(file: Path) -> Stamp:
    with file.open("rb") as opened:  # that it can be read is known then, too
        return stamp(opened.fileno())


def _columns(rows: Sequence[int], sequences: int) -> list[tuple[array[int], int]]:
    """Empty columns, and what belongs in each: starts and lines of each file, parts of all rows, and lengths."""
    placed = [(array("Q"), size) for size in rows for _ in ("starts", "lines")]
    return [*placed, (array("I"), sum(rows)), (array("I"), sequences)]


def _digest(head: bytes, columns: Sequence[array[int]]) -> bytes:
    digest = hashlib.sha256(head)
    for column in columns:
        digest.update(column)
    return digest.hexdigest().encode()


def _files_digest(folder: Path, suffixes: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in suffixes and file.is_file() and os.access(file, os.R_OK):
            digest.update(f"{file.name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
