"""Metrics on disk: one JSON line a step; and the trackers of the recipe beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.files import replace_text
from millrace.observe.lines import read_lines
from millrace.observe.trackers import Tracker


class MetricsWriter:
    """Writes RUN_DIR/metrics.jsonl and tells the trackers.

    A resumed run repeats the steps since its last checkpoint: lines at or after `first_step` are dropped at the start,
    so that each step stands in the file once. Trackers that keep what they were told are not told again of a step that
    comes out as before; one that comes out otherwise, in a run that was rewound and changed, is news.
    """

    def __init__(self, run_dir: Path, first_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._dropped = self._drop_from(first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = trackers

    def _drop_from(self, first_step: int) -> dict[int, dict[str, Any]]:
        """Cut the file before `first_step`; returns what was cut off, by step."""
        rows = read_metrics(self.path)
        if rows:
            kept = (row for row in rows if row["step"] < first_step)
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        return {row["step"]: row for row in rows if row["step"] >= first_step}

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        row = {"step": step, "stage": stage, **values}
        known = _same_but_for_times(self._dropped.pop(step, None), row)
        for tracker in self._trackers:
            if not (known and tracker.keeps):
                tracker.log(step, stage, values)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; no file has none, and a line that a kill cut short is left out."""
    return [row for row in read_lines(path) if "step" in row]


def _same_but_for_times(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    return before is not None and _timeless(before) == _timeless(now)


def _timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("time/")}
