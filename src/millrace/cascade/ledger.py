"""The ledger of a run: an append-only record of what was done, from which a run is explained and resumed.

One JSON object a line in RUN_DIR/ledger.jsonl: `number` (1, 2, ...), `event`, `time` (seconds since the epoch), the
event's facts, and `hash`, by which each line proves those before it (`observe.chain`). RUN_DIR/ledger.head names the
last entry, so that lines missing at the end are noticed as well. What does not fit is never read as a fact; `recover`
moves it aside, and the run goes on from the last whole entry.

Events: `stage_started`, `evaluated`, `stage_finished`, `exported`, `finished`, `stopped`, and `rewound` with `to`: that
stage and the later ones run again, so what was recorded of them before counts no more (`counted`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from millrace.config.graph import START
from millrace.errors import MillraceError
from millrace.observe.chain import Entry, Proven, chained_line, first_problem, proven
from millrace.observe.entries import counted, stage_of_entry

_OWN_KEYS = frozenset({"number", "event", "time", "hash"})


class LedgerDamaged(MillraceError):
    """The ledger does not fit its hashes, so nothing can be appended to it."""


class Ledger:
    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "ledger.jsonl"
        self.head = run_dir / "ledger.head"

    def append(self, event: str, **facts: Any) -> None:
        """Record an event; it is on disk when this returns. Raises LedgerDamaged; `recover` mends that."""
        assert not _OWN_KEYS & facts.keys(), "these keys are the ledger's own"
        content = self._content()
        known = proven(content)
        if known.size < len(content):
            problem = first_problem(content, known)
            raise LedgerDamaged(f"{self.path}: {problem}; run the same command again, which goes on from what is whole")
        entry = {"number": len(known.entries) + 1, "event": event, "time": time.time(), **facts}
        line = chained_line(entry, known.previous)
        # A kill between a line and its end leaves a whole entry, to which the next one must not be glued.
        glue = b"\n" if content and not content.endswith(b"\n") else b""
        with self.path.open("ab") as file:
            file.write(glue + line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._name_last(json.loads(line))

    def recover(self) -> str | None:
        """Make the ledger fit to go on from: called once, by one process, before a run appends anything.

        What stands behind the last whole entry is moved to ledger.jsonl.damaged-N, which replaces no earlier one.
        Returns one sentence that says what was found and what follows, or None when all is well.
        """
        content = self._content()
        known = proven(content)
        if known.size < len(content):
            problem, aside = first_problem(content, known), self._free_name()
            _replace(aside, content[known.size :])
            _replace(self.path, content[: known.size])
            found = f"{problem}; it and all behind it count no more and were moved to {aside.name}"
        elif self.head.exists() and self.head.read_bytes() not in map(_head_of, known.entries):
            found = f"entries are missing at its end, for {self.head.name} names one that it does not hold"
        else:
            return None
        self._name_last(known.entries[-1] if known.entries else {})
        return f"{self.path}: {found}; {_what_follows(known)}"

    def events(self, event: str | None = None) -> list[Entry]:
        """All events that the ledger proves, or those of one kind, oldest first."""
        entries = proven(self._content()).entries
        return [entry for entry in entries if event is None or entry["event"] == event]

    def is_finished(self, stages: list[str]) -> bool:
        """Whether a run through these stages has come to its end, and was not rewound since."""
        finished = [entry for entry in counted(self.events(), stages) if entry["event"] == "finished"]
        return bool(finished) and finished[-1]["stages"] == stages

    def scores(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The stage-by-domain matrix: {label: {domain: {"pass_rate", "half_width", "answers"}}}."""
        return {entry["after"]: entry["scores"] for entry in self.events("evaluated")}

    def _content(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def _name_last(self, entry: Entry) -> None:
        if "hash" in entry:
            _replace(self.head, _head_of(entry))
        else:
            self.head.unlink(missing_ok=True)

    def _free_name(self) -> Path:
        names = (self.path.with_name(f"{self.path.name}.damaged-{number}") for number in count(1))
        return next(name for name in names if not name.exists())


@dataclass(frozen=True)
class Standing:
    """How far a run has come, by the names of its stages."""

    begun: tuple[str, ...]
    """Stages that are in progress or through. `start` is among them once the model itself was measured."""
    finished: tuple[str, ...]
    """Stages that are through."""


def standing(events: Sequence[Entry], stages: Sequence[str]) -> Standing:
    """How far a run has come through `stages`, in their order."""
    begun, finished = set(), set()
    for entry in counted(events, stages):
        begun.add(stage_of_entry(entry))
        if entry["event"] == "stage_finished":
            finished.add(entry["stage"])
    return Standing(
        tuple(name for name in (START, *stages) if name in begun), tuple(name for name in stages if name in finished)
    )


def _what_follows(known: Proven) -> str:
    if not known.entries:
        return "nothing of it is left, so the run goes on as if nothing had been recorded"
    last = known.entries[-1]
    what = " ".join(filter(None, (last["event"], last.get("stage") or last.get("after"))))
    return f"the run goes on from entry {len(known.entries)} ({what})"


def _head_of(entry: Entry) -> bytes:
    return f"{entry.get('number')} {entry.get('hash')}\n".encode()


def _replace(path: Path, content: bytes) -> None:
    """Write a file aside and put it in its place; it is on disk when this returns."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
