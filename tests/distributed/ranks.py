"""Starts a script as N ranks on this machine and waits for them: RANK, WORLD_SIZE and MASTER_* in the environment.

A test that needs ranks launches one script for many checks, since starting ranks (importing torch and Megatron-Core)
takes longer than what a tiny model does afterwards.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

TAIL = 4000
"""Characters of a failed rank's output that the test shows."""


class RanksFailed(AssertionError):
    """A rank ended with an error or did not end in time."""


def free_port() -> int:
    """A port below those the system hands out by itself: gloo's own connections take such a one at any moment, also
    between this choice and its use by a later case."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port


def launch(script: Path, world: int, args: Sequence[str] = (), timeout: float = 300.0) -> list[str]:
    """Run `python script args...` on `world` ranks; what each wrote to stdout and stderr.

    The first rank that fails, or the time limit, ends all of them and raises RanksFailed with their last output.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(world)]
        port = free_port()
        ranks = [_start(script, rank, world, port, args, log) for rank, log in enumerate(logs)]
        try:
            problem = _wait(ranks, timeout)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
    if problem:
        tails = "\n".join(f"--- rank {rank}\n{text[-TAIL:]}" for rank, text in enumerate(outputs))
        raise RanksFailed(f"{script.name} {' '.join(args)}: {problem}\n{tails}")
    return outputs


def _start(script: Path, rank: int, world: int, port: int, args: Sequence[str], log: Path) -> subprocess.Popen:
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with log.open("w") as out:
        return subprocess.Popen([sys.executable, str(script), *args], env=env, stdout=out, stderr=subprocess.STDOUT)


def _wait(ranks: Sequence[subprocess.Popen], timeout: float) -> str | None:
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return f"rank {failed[0]} ended with exit code {codes[failed[0]]}"
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > deadline:
            return f"ranks {[r for r, c in enumerate(codes) if c is None]} did not end within {timeout:g} s"
        time.sleep(0.05)
