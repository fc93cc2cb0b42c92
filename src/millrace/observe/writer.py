"""Metrics on disk: one JSON line a step, and TensorBoard beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Writes RUN_DIR/metrics.jsonl and RUN_DIR/tensorboard.

    A resumed run repeats the steps since its last checkpoint: lines at or after `first_step` are dropped at the start,
    so that each step stands in the file once.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._drop_from(first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def _drop_from(self, first_step: int) -> None:
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] < first_step]
        aside = self.path.with_suffix(".jsonl.tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(aside, self.path)

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics file; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
