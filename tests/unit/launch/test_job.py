"""What a launched run remembers of its jobs."""

from pathlib import Path

import pytest

from millrace.launch.job import MOST_STARTS, StuckError, note_start, read_job
from millrace.rollout.rendezvous import read_json


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    return tmp_path


def test_a_job_of_another_launcher_is_remembered(run_dir: Path) -> None:
    note_start(run_dir, "17.0")
    record = read_job(run_dir / "launch")
    assert record is not None and record.ids == ("17",)
    assert read_json(run_dir / "launch" / "current.json")["job"] == "17.0"


def test_a_job_that_gets_nowhere_is_not_started_for_ever(run_dir: Path) -> None:
    for restart in range(MOST_STARTS):
        note_start(run_dir, f"17.{restart}")
    with pytest.raises(StuckError, match="3 starts of job 17 were ended before the run got any further"):
        note_start(run_dir, f"17.{MOST_STARTS}")
    note_start(run_dir, "18.0")  # launched anew by somebody


def test_any_step_in_between_counts(run_dir: Path) -> None:
    for restart in range(3 * MOST_STARTS):
        if restart % MOST_STARTS == 0:
            with (run_dir / "metrics.jsonl").open("a") as metrics:
                metrics.write("{}\n")
        note_start(run_dir, f"17.{restart}")
