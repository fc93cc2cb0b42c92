"""Lines that prove each other: JSON objects, each with a SHA-256 over the hash before it and its own bytes. Pure.

A line that was changed, inserted, moved or half written, or that stands behind one that is missing, does not fit the
hash before it; it and all behind it count for nothing. The hashes tell accidents and careless edits; whoever wants to
forge a file can compute them too.

Files may begin with lines from the time before there were hashes. Those are taken as they are, and half ones among them
are passed over; the first hash covers them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]

_HASH = b', "hash": "'
"""Stands before the hash, which is the last value of a line. Inside a text JSON escapes the quotes."""
GENESIS = hashlib.sha256().hexdigest()
"""What the first line of all builds on."""


@dataclass(frozen=True)
class Proven:
    """The longest beginning of a file that its hashes prove."""

    entries: tuple[Entry, ...]
    size: int
    """Its bytes; those behind are damaged."""
    previous: str
    """The hash that the next line builds on."""


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def chained_line(entry: Mapping[str, Any], previous: str) -> bytes:
    """An entry as a line, without its end, behind the one whose hash is `previous`."""
    return _seal(json.dumps(entry)[:-1].encode(), previous)


def proven(content: bytes) -> Proven:
    """What a file proves. Its last line counts when it is whole, with or without its newline."""
    entries: list[Entry] = []
    size, previous, chained = 0, GENESIS, False
    for start, end, line in _lines(content):
        entry = _parsed(line)
        if not chained and (entry is None or not _has_hash(entry)):
            if entry is not None:
                entries.append(entry)
                size, previous = end, hash_of(content[:end].rstrip(b"\n"))
            continue
        if entries and not chained and _fits(line, GENESIS):
            return Proven((), 0, GENESIS)  # it was the first line of all, so those before it were inserted
        if entry is None or start != size or not _fits(line, previous):
            break
        entries.append(entry)
        size, previous, chained = end, entry["hash"], True
    return Proven(tuple(entries), size, previous)


def first_problem(content: bytes, known: Proven) -> str:
    """What is wrong behind the proven beginning, as a clause: "line 3 is not a whole entry"."""
    number, line = content[: known.size].count(b"\n") + 1, content[known.size :].split(b"\n")[0]
    return f"line {number} {_problem(line, len(known.entries) + 1)}"


def _problem(line: bytes, due: int) -> str:
    entry = _parsed(line)
    if entry is None:
        return "is not a whole entry"
    if not _has_hash(entry):
        return "has no hash"
    if entry.get("number") != due:
        return f"has number {entry.get('number')} where {due} is due"
    return "does not fit its hash"


def _seal(body: bytes, previous: str) -> bytes:
    return body + _HASH + hash_of(previous.encode() + body).encode() + b'"}'


def _fits(line: bytes, previous: str) -> bool:
    return line == _seal(line.rpartition(_HASH)[0], previous)


def _lines(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Start, end with the newline, and the bytes of each line."""
    start = 0
    while start < len(content):
        newline = content.find(b"\n", start)
        end = len(content) if newline < 0 else newline + 1
        yield start, end, content[start:end].removesuffix(b"\n")
        start = end


def _parsed(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None


def _has_hash(entry: Entry) -> bool:
    """Whether the line claims to be one of the chain; damage to one byte cannot hide both keys."""
    return "hash" in entry or "number" in entry
