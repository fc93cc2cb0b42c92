import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import waiting
from waiting import is_running

from millrace.config.schema import TrainerConfig
from millrace.launch.local import STOPPED, RankFailed, run_ranks, trainer_environment

wait_until = partial(waiting.wait_until, limit=10.0)

Ranks = Callable[..., int]


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """Runs a program's text as two ranks."""

    def run(program: str, count: int = 2) -> int:
        (tmp_path / "trial.py").write_text(program)
        environment = trainer_environment(TrainerConfig(device="cpu"), count) | {"PYTHONPATH": str(tmp_path)}
        return run_ranks("trial", [str(tmp_path)], count, environment, tmp_path / "logs")

    return run


def test_ranks_find_each_other_over_gloo(ranks: Ranks, tmp_path: Path) -> None:
    program = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
open(f"{sys.argv[1]}/sum-{os.environ['LOCAL_RANK']}", "w").write(str(total.item()))
dist.destroy_process_group()
"""
    assert ranks(program) == 0
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]


def test_a_rank_that_dies_is_named_with_its_log_and_its_peers_end(ranks: Ranks, tmp_path: Path) -> None:
    program = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    raise ValueError("the data ran out")
dist.barrier()
"""
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 ended with exit code 1; its log is .*/logs/rank-1\.log, .*ran out"):
        ranks(program)
    assert time.monotonic() - started < 15


def test_a_rank_that_hangs_after_another_died_is_ended(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.launch.local.GRACE_SECONDS", 0.5)
    program = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)\n"
    with pytest.raises(RankFailed, match="rank 1 was ended by SIGKILL"):
        ranks(program)


def test_a_rank_that_waits_for_one_that_stopped_is_ended(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.launch.local.GRACE_SECONDS", 0.5)
    program = "import os, sys, time\nif os.environ['RANK'] == '0': sys.exit(130)\ntime.sleep(60)\n"
    started = time.monotonic()
    assert ranks(program) == STOPPED
    assert time.monotonic() - started < 15


def test_a_stop_while_python_starts_is_no_failure(ranks: Ranks, tmp_path: Path) -> None:
    program = """
import os, sys, time
open(f"{sys.argv[1]}/ready-{os.environ['RANK']}", "w").close()
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.stderr.write("KeyboardInterrupt\\n")
    sys.exit(1)
"""

    def stop() -> None:
        wait_until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert ranks(program) == STOPPED
    stopper.join()


STOPS_WHEN_ASKED = """
import os, signal, sys, time
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: asked.append(n))
open(f"{sys.argv[1]}/ready-{os.environ['RANK']}", "w").close()
while not asked: time.sleep(0.01)
time.sleep(0.2)
open(f"{sys.argv[1]}/asked-{os.environ['RANK']}", "w").write(str(len(asked)))
sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_every_rank_exactly_once(ranks: Ranks, tmp_path: Path, number: signal.Signals) -> None:
    def stop() -> None:
        wait_until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
        os.kill(os.getpid(), number)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert ranks(STOPS_WHEN_ASKED) == STOPPED
    stopper.join()
    assert [(tmp_path / f"asked-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(ranks: Ranks, tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: open(f"{sys.argv[1]}/asked-{os.environ['RANK']}", "w").close())
open(f"{sys.argv[1]}/ready-{os.environ['RANK']}", "w").close()
while True: time.sleep(60)
"""

    def stop() -> None:
        for sign in ("ready", "asked"):
            wait_until(lambda sign=sign: all((tmp_path / f"{sign}-{rank}").exists() for rank in (0, 1)))  # type: ignore[misc]
            os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert ranks(program) == STOPPED
    stopper.join()


def test_what_a_rank_leaves_behind_is_ended(ranks: Ranks, tmp_path: Path) -> None:
    program = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "60"])
open(f"{sys.argv[1]}/child-{os.environ['RANK']}", "w").write(str(child.pid))
"""
    assert ranks(program) == 0
    wait_until(lambda: not any(is_running(int((tmp_path / f"child-{rank}").read_text())) for rank in (0, 1)))


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    (tmp_path / "trial.py").write_text(
        "import os, sys, time\n"
        "open(f\"{sys.argv[1]}/pid-{os.environ['RANK']}\", 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from millrace.launch.local import run_ranks;"
            "run_ranks('trial', [sys.argv[1]], 2, {'PYTHONPATH': sys.argv[1]}, Path(sys.argv[1]))",
            str(tmp_path),
        ]
    )
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(is_running(int(file.read_text())) for file in files))


def test_the_threads_of_a_rank_are_its_share_of_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert trainer_environment(TrainerConfig(), cores)["OMP_NUM_THREADS"] == "1"
    assert trainer_environment(TrainerConfig(threads_per_rank=7), 2)["OMP_NUM_THREADS"] == "7"
    assert "TORCH_COMPILE_DISABLE" in trainer_environment(TrainerConfig(device="cpu"), 1)
    assert "TORCH_COMPILE_DISABLE" not in trainer_environment(TrainerConfig(device="cuda"), 1)
