"""The ledger of a run: an append-only record of what was done, from which a run is explained and resumed.

One JSON object a line in RUN_DIR/ledger.jsonl, each with `event` and `time` (seconds since the epoch). Events:
`stage_started`, `evaluated`, `stage_finished`, `exported`, `finished`, `stopped`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Ledger:
    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "ledger.jsonl"

    def append(self, event: str, **facts: Any) -> None:
        """Record an event; it is on disk when this returns."""
        line = json.dumps({"event": event, "time": time.time(), **facts}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line if self._ends_cleanly() else "\n" + line)
            file.flush()
            os.fsync(file.fileno())

    def _ends_cleanly(self) -> bool:
        # A kill in the middle of an append leaves half a line; the next event must not be glued to it.
        if not self.path.exists() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """All events, or those of one kind, oldest first. Half a line left by a kill is passed over."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if event is None or entry["event"] == event:
                found.append(entry)
        return found

    def is_finished(self, stages: list[str]) -> bool:
        """Whether a run through these stages has come to its end."""
        finished = self.events("finished")
        return bool(finished) and finished[-1]["stages"] == stages

    def scores(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The stage-by-domain matrix: {label: {domain: {"pass_rate", "half_width", "answers"}}}."""
        return {entry["after"]: entry["scores"] for entry in self.events("evaluated")}
