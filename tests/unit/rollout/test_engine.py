"""The process side of an engine, with a command of its own in place of the server."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from waiting import is_running, wait_until

TREE = """
import pathlib, subprocess, sys, time
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
pathlib.Path(sys.argv[1]).write_text(f"{child.pid}")
time.sleep(60)
"""


def supervise(parent: int, *command: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "millrace.rollout.supervisor", str(parent), *command], start_new_session=True
    )


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A supervised process with a child that ignores SIGTERM, and the pid of that child."""
    note = tmp_path / "pid"
    supervisor = supervise(os.getpid(), sys.executable, "-c", TREE, str(note))
    wait_until(lambda: note.exists() and bool(note.read_text()))
    yield supervisor, int(note.read_text())
    if supervisor.poll() is None:
        os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.wait()


def test_the_exit_status_is_passed_on() -> None:
    assert supervise(os.getpid(), sys.executable, "-c", "raise SystemExit(7)").wait(20) == 7


def test_sigterm_ends_the_whole_tree_even_what_ignores_it(tree: tuple["subprocess.Popen[bytes]", int]) -> None:
    supervisor, grandchild = tree
    supervisor.terminate()
    supervisor.wait(20)
    assert not is_running(grandchild)


def test_the_tree_ends_when_the_thread_that_started_it_ends(tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    release = threading.Event()

    def starter() -> None:
        started.append(supervise(os.getpid(), sys.executable, "-c", "import time; time.sleep(60)"))
        release.wait(20)

    thread = threading.Thread(target=starter)
    thread.start()
    wait_until(lambda: bool(started) and bool(psutil.Process(started[0].pid).children()))  # it watches by now
    assert started[0].poll() is None
    release.set()
    thread.join()
    started[0].wait(20)


def test_a_parent_that_died_before_is_noticed() -> None:
    assert supervise(1, sys.executable, "-c", "import time; time.sleep(60)").wait(20) == 1


def test_a_warning_of_the_scheduler_ends_no_engine(tree: tuple["subprocess.Popen[bytes]", int]) -> None:
    supervisor, grandchild = tree
    for pid in (supervisor.pid, grandchild):
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.2)
    assert supervisor.poll() is None and psutil.Process(grandchild).status() != psutil.STATUS_ZOMBIE


def test_sockets_that_a_killed_command_leaves_go_with_its_supervisor(tmp_path: Path) -> None:
    note = tmp_path / "folder"
    leave = f"import os, pathlib; pathlib.Path({str(note)!r}).write_text(os.environ['VLLM_RPC_BASE_PATH'])"
    leave += "; pathlib.Path(os.environ['VLLM_RPC_BASE_PATH'], 'socket').touch(); os.kill(os.getpid(), 9)"
    assert supervise(os.getpid(), sys.executable, "-c", leave).wait(20) == 128 + signal.SIGKILL
    assert not Path(note.read_text()).exists()
