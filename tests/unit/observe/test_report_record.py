"""What the report takes for a fact: what the run itself would go on from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from millrace.observe.chain import GENESIS, chained_line, proven
from millrace.observe.report.record import read_run

SCORE = {"math": {"pass_rate": 0.5, "half_width": 0.1}}
EVENTS = (
    {"event": "evaluated", "after": "start", "scores": SCORE},
    {"event": "stage_started", "stage": "rl", "step": 0},
    {"event": "evaluated", "after": "rl", "scores": SCORE},
)


def write(folder: Path, *events: Mapping[str, Any]) -> Path:
    previous, lines = GENESIS, b""
    for number, event in enumerate(events, 1):
        lines += chained_line({"number": number, "time": 1.0 * number, **event}, previous) + b"\n"
        previous = proven(lines).previous
    (folder / "ledger.jsonl").write_bytes(lines)
    return folder / "ledger.jsonl"


def test_a_whole_ledger_is_shown_without_a_word(tmp_path: Path) -> None:
    write(tmp_path, *EVENTS)
    run = read_run(tmp_path)
    assert list(run.scores) == ["start", "rl"]
    assert not any(note.startswith("ledger") for note in run.notes)


@pytest.mark.parametrize(
    ("was", "becomes", "line"),
    [
        (b'"after": "rl", "scores"', b'"after": "rl@3", "scores"', 3),
        (b'"stage": "rl", "step": 0', b'"stage": "rl", "step": 1', 2),
    ],
)
def test_what_the_run_would_not_count_is_not_shown(tmp_path: Path, was: bytes, becomes: bytes, line: int) -> None:
    ledger = write(tmp_path, *EVENTS)
    ledger.write_bytes(ledger.read_bytes().replace(was, becomes))
    run = read_run(tmp_path)
    assert list(run.scores) == ["start"]
    assert f"ledger.jsonl: line {line} does not fit its hash, so it and all behind it count no more." in run.notes


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    ledger = write(tmp_path, *EVENTS)
    ledger.write_bytes(ledger.read_bytes()[:-9])
    assert list(read_run(tmp_path).scores) == ["start"]


def test_what_was_rewound_is_not_shown(tmp_path: Path) -> None:
    write(tmp_path, *EVENTS, {"event": "finished", "stages": ["rl"]}, {"event": "rewound", "to": "rl"})
    run = read_run(tmp_path)
    assert list(run.scores) == ["start"] and run.state != "finished"
