"""Which training prompts a stage draws, by how often a model solved them, and in which order.

Prompts that are always or never solved give no gradient to an algorithm that compares the answers of a group, and
progressively harder data is part of Cascade RL. Pass rates come from a JSONL file, {"id", "pass_rate", ...} a row, that
`millrace data passrate` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.data.datasets import JsonlFile, PromptDataset, Row
from millrace.data.errors import DataError


@dataclass(frozen=True)
class ChosenRows:
    """The rows of a data set that a curriculum draws."""

    rows: tuple[int, ...]
    """Their indices, rising."""
    rates: tuple[float, ...] | None
    """Their pass rates where they are drawn from easy to hard, None where they are shuffled."""
    too_hard: int
    """Rows left out because their pass rate is not above the lower bound."""
    too_easy: int
    """Rows left out because their pass rate is not below the upper bound."""

    def __len__(self) -> int:
        return len(self.rows)


def choose_rows(rates: Sequence[float], *, above: float | None, below: float | None, easy_to_hard: bool) -> ChosenRows:
    """The rows whose pass rate lies above `above` and below `below`; None is no bound."""
    hard = [above is not None and rate <= above for rate in rates]
    easy = [below is not None and rate >= below for rate in rates]
    kept = tuple(row for row in range(len(rates)) if not hard[row] and not easy[row])
    return ChosenRows(kept, tuple(rates[row] for row in kept) if easy_to_hard else None, sum(hard), sum(easy))


def rates_of_rows(dataset: PromptDataset, rates: Mapping[str, float], source: Path) -> list[float]:
    """The pass rate of every row of a data set, by its id. Raises DataError for a row that has none."""
    found = []
    for index in range(len(dataset)):
        row_id = dataset.row_id(index)
        if row_id not in rates:
            raise DataError(
                f"{dataset.where(index)}: the row with the id {row_id} has no pass rate in {source}; measure it with "
                "`millrace data passrate`, which goes on where that file ends"
            )
        found.append(rates[row_id])
    return found


def read_pass_rates(path: Path) -> dict[str, float]:
    """Pass rates by row id. Raises DataError for a bad row or one that is there twice."""
    file = JsonlFile(path, ("id", "pass_rate"), _problem)
    rates: dict[str, float] = {}
    for index, row in enumerate(file):
        if str(row["id"]) in rates:
            raise DataError(f"{file.where(index)}: the id {row['id']} has a pass rate already; leave one of them out")
        rates[str(row["id"])] = float(row["pass_rate"])
    return rates


def _problem(row: Row) -> str | None:
    rate = row["pass_rate"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        return f"pass_rate must be a number from 0 to 1, not {rate!r}"
    return None
