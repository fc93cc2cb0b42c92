"""What is said of a run by its folder alone: on this machine, and of a job that nobody knows any more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millrace.cascade.ledger import Ledger
from millrace.config.errors import ConfigError
from millrace.config.loading import dump_recipe, load_recipe
from millrace.config.placement import NodeRanks, Placement, ServerPlace, VerifierPlace
from millrace.launch.job import JobRecord, read_job, write_job
from millrace.launch.local import RankFailed, failure_on_record
from millrace.launch.run_dir import locked
from millrace.launch.status import cancel_run, follow, log_file, node_parts, status_lines


@pytest.fixture
def run_dir(recipe_file: Path) -> Path:
    folder = recipe_file.parent / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe_file)))
    return folder


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run: it has no recipe\.yaml"):
        status_lines(tmp_path)


def test_a_run_on_this_machine_tells_step_rate_checkpoint_and_last_word(run_dir: Path) -> None:
    assert status_lines(run_dir) == [f"{run_dir}: does not run", "stages done: none of warm, climb"]
    ledger = Ledger(run_dir)
    ledger.append("stage_started", stage="warm")
    ledger.append("stage_finished", stage="warm")
    rows = ['{"step": 10, "stage": "warm", "time/step": 9}', '{"step": 11, "stage": "climb", "time/step": 2}']
    rows += ['{"step": 12, "stage": "climb", "time/step": 3}', '{"step": 13, "sta']  # a kill cut it short
    (run_dir / "metrics.jsonl").write_text("\n".join(rows))
    for number, name in enumerate(("step-00000010", "step-00000012", ".step-00000014")):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        os.utime(run_dir / "checkpoints" / name, (0, time.time() - 600 + number))
    (run_dir / "logs" / "run.log").write_text("one\nwaiting for the engines to start: 20 s of 300 s\n")
    with locked(run_dir):
        lines = status_lines(run_dir)
    assert lines == [
        f"{run_dir}: runs, process {os.getpid()}",
        "stages done: warm of warm, climb",
        "in climb, step 2 of 5, 2.5 s a step",
        "last checkpoint: step-00000012, 10 min ago",
        "last word: waiting for the engines to start: 20 s of 300 s",
    ]


def test_a_run_that_failed_on_this_machine_says_why_until_it_is_started_again(run_dir: Path) -> None:
    said = "^rank 1 was ended; once its cause is mended the same command goes on from what is saved$"
    with pytest.raises(RankFailed, match=said), failure_on_record(run_dir):
        raise RankFailed("rank 1 was ended", lost_peer=False, last_lines="first\nlast")
    assert status_lines(run_dir)[-1] == "failed: rank 1 was ended\nfirst\nlast"
    with failure_on_record(run_dir):
        assert status_lines(run_dir)[-1] == "stages done: none of warm, climb"


def test_a_run_on_this_machine_is_cancelled_by_asking_it_to_save(run_dir: Path) -> None:
    assert cancel_run(run_dir) == f"{run_dir}: nothing runs"
    program = """
import signal, sys, time
from pathlib import Path
from millrace.launch.local import RankFailed, failure_on_record
from millrace.launch.run_dir import locked
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in the background is started without
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run_dir)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert cancel_run(run_dir) == f"asked process {holder.pid} to save and stop"
    assert holder.wait(20) == -signal.SIGINT


def test_a_launched_run_without_slurm_here_says_so_and_tells_the_rest(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (run_dir / "launch").mkdir()
    record = JobRecord(ids=("12", "13"), log=str(run_dir / "logs" / "job-%j.log"))
    write_job(run_dir / "launch", record)
    assert read_job(run_dir / "launch") == record
    first, *rest = status_lines(run_dir)
    assert first.startswith(f"{run_dir}: launched as Slurm job 12, 13; squeue is not on PATH")
    assert rest == ["stages done: none of warm, climb"]


def test_each_node_of_a_job_is_told_with_its_parts() -> None:
    placement = Placement(
        nodes=3,
        trainer=(NodeRanks(node=0, first_rank=0, ranks=2),),
        servers=(ServerPlace(kind="engine", index=0, node=1, gpus=(0,)),),
        verifiers=(VerifierPlace(node=2, workers=4),),
    )
    assert [list(node_parts(placement, node)) for node in range(3)] == [["ranks 0 to 1"], ["engine-0"], ["4 verifiers"]]


def test_logs_are_found_by_the_name_of_their_component(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="has no log yet"):
        log_file(run_dir, None)
    for name in ("run", "rank-1", "job-7", "job-12"):
        (run_dir / "logs" / f"{name}.log").write_text(name)
    os.utime(run_dir / "logs" / "job-7.log", (0, 0))
    assert log_file(run_dir, None).name == "job-12.log"
    assert list(follow(log_file(run_dir, "rank-1"), goes_on=False)) == ["rank-1"]
    with pytest.raises(ConfigError, match="has no log of rank-2; it has job-12, job-7, rank-1, run"):
        log_file(run_dir, "rank-2")
