from dataclasses import dataclass, field
from pathlib import Path

from millrace.observe.writer import MetricsWriter, read_metrics


@dataclass
class Heard:
    """A tracker that keeps what it is told in a list."""

    keeps: bool = True
    told: list[tuple[int, float]] = field(default_factory=list)
    closed: bool = False

    def log(self, step, stage, values):
        self.told.append((step, values["loss"]))

    def close(self):
        self.closed = True


def write_steps(run_dir: Path, first: int, steps: int, *trackers: Heard, factor: float = 1.0) -> None:
    writer = MetricsWriter(run_dir, first, trackers)
    for step in range(first, first + steps):
        writer.write(step, "sft", {"loss": factor / (step + 1), "time/train": float(steps)})
    writer.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_steps(tmp_path, 0, 6)
    write_steps(tmp_path, 3, 4)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(7))


def test_half_a_line_is_passed_over(tmp_path):
    write_steps(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 2, "stage": "é'.encode()[:-1])
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    write_steps(tmp_path, 2, 1)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_tracker_that_keeps_its_steps_is_not_told_twice_of_what_comes_out_as_before(tmp_path):
    write_steps(tmp_path, 0, 6, first := Heard())
    write_steps(tmp_path, 3, 5, kept := Heard(), purged := Heard(keeps=False))
    assert [step for step, _ in first.told] == list(range(6)) and first.closed
    assert [step for step, _ in kept.told] == [6, 7]
    assert [step for step, _ in purged.told] == [3, 4, 5, 6, 7]


def test_a_step_that_comes_out_otherwise_after_a_rewind_is_told(tmp_path):
    write_steps(tmp_path, 0, 4)
    write_steps(tmp_path, 2, 2, heard := Heard(), factor=2.0)
    assert heard.told == [(2, 2 / 3), (3, 2 / 4)]
