"""Pass rates of single prompts: one JSONL row each, written as they are measured, and a summary for people.

A file of pass rates has its settings beside it (FILE.settings.json), since rows that were measured differently would
not compare. Measuring again with the same settings goes on where the file ends.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.data.datasets import JsonlFile
from millrace.data.errors import DataError
from millrace.evaluation.pass_rate import pass_rate
from millrace.files import replace_text

BAR_WIDTH = 40


@dataclass(frozen=True)
class PromptPassRate:
    id: str
    """The row's id, as its data set gives it."""
    pass_rate: float
    """Mean reward of the answers."""
    passed: int
    """Answers with the full reward of 1."""
    samples: int
    """Answers."""
    mean_length: float
    """Mean length of the answers, tokens."""


def prompt_pass_rate(row_id: str, rewards: Sequence[float], lengths: Sequence[int]) -> PromptPassRate:
    """What the answers to one prompt say of it, from the reward and the length of each."""
    n = len(rewards)
    return PromptPassRate(row_id, sum(rewards) / n, sum(reward >= 1 for reward in rewards), n, sum(lengths) / n)


class PassRateFile:
    """The measured prompts of a file, open for more.

    Raises:
        DataError: the file cannot be written, was measured with other settings, is being written by another process,
            or has a bad row before its last line. Half a last line, which a kill leaves, is cut off.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, PromptPassRate] = {}
        """Measured prompts by row id."""
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise DataError(f"{path}: the file cannot be written: {error.strerror}; name another one") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{path}: another process is measuring into this file; wait for it, or name another"
            ) from None
        self._cut_half_a_line()
        if path.stat().st_size:
            self._require_same(settings)
            self._read()
        else:
            replace_text(self._settings_path, json.dumps(settings, indent=2) + "\n")

    def append(self, rows: Iterable[PromptPassRate]) -> None:
        """Add rows; they are on disk when this returns."""
        for row in rows:
            self._file.write(json.dumps(dataclasses.asdict(row)).encode() + b"\n")
            self.rows[row.id] = row
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @property
    def _settings_path(self) -> Path:
        return self.path.with_name(self.path.name + ".settings.json")

    def _cut_half_a_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        if not self._settings_path.exists():
            raise DataError(
                f"{self.path}: there is no {self._settings_path.name} beside it, so nobody knows how its pass rates "
                "were measured; name another file"
            )
        known = json.loads(self._settings_path.read_text(encoding="utf-8"))
        different = [key for key in settings if known.get(key) != settings[key]]
        if different:
            told = ", ".join(f"{key} {known.get(key)} (now {settings[key]})" for key in different)
            raise DataError(
                f"{self.path}: its pass rates were measured with {told}, and would not compare with new ones; name "
                "another file, or remove this one to measure all again"
            )

    def _read(self) -> None:
        fields = [field.name for field in dataclasses.fields(PromptPassRate)]
        for row in JsonlFile(self.path, fields):
            self.rows[row["id"]] = PromptPassRate(**{name: row[name] for name in fields})


def summary(rows: Sequence[PromptPassRate]) -> str:
    """A histogram of the pass rates, with the shares that are never and always solved."""
    rates = [row.pass_rate for row in rows]
    edges = (0.25, 0.5, 0.75, 1.0)
    counts = {"never solved": sum(rate <= 0 for rate in rates)}
    for low, high in zip((0.0, *edges), edges, strict=False):
        label = f"{100 * low:.0f}% to {100 * high:.0f}%"
        counts[label] = sum(low <= rate < high and rate > 0 for rate in rates)
    counts["always solved"] = sum(rate >= 1 for rate in rates)
    most, width = max(counts.values()), max(map(len, counts))
    lines = [
        f"{label:{width}}  {count:{len(str(len(rows)))}}  {100 * count / len(rows):5.1f}%  "
        + "█" * round(BAR_WIDTH * count / most)
        for label, count in counts.items()
    ]
    mean = pass_rate([[rate] for rate in rates])
    answers = sum(row.samples for row in rows)
    length = sum(row.mean_length * row.samples for row in rows) / answers
    first = f"{len(rows)} prompts, {answers} answers of {length:.0f} tokens in the mean, pass rate {mean}"
    return "\n".join(line.rstrip() for line in [first, *lines])
