"""Runs a script as N ranks on this machine and waits for them: RANK, WORLD_SIZE and MASTER_* in the environment.

A test that needs ranks launches one script for many checks: connecting their groups takes longer than what a tiny
model does afterwards. What ranks import is imported once, by the process that all of them are forked of (`nursery`).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from millrace.ports import free_port

TAIL = 4000
"""Characters of a failed rank's output that the test shows."""
ALL_RANKS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class RanksFailed(AssertionError):
    """A rank ended with an error or did not end in time."""


def launch(script: Path, world: int, args: Sequence[str] = (), timeout: float = 600.0) -> list[str]:
    """Run `python script args...` on `world` ranks; what each wrote to stdout and stderr.

    The first rank that fails, or the time limit, ends all of them and raises RanksFailed with their last output.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(world)]
        for log in logs:
            log.touch()
        port = free_port()
        ranks = [{"environment": _environment(rank, world, port), "log": str(log)} for rank, log in enumerate(logs)]
        problem = _ask({"script": str(script), "arguments": list(args), "ranks": ranks, "timeout": timeout})
        outputs = [log.read_text(errors="replace") for log in logs]
    if problem:
        tails = "\n".join(f"--- rank {rank}\n{text[-TAIL:]}" for rank, text in enumerate(outputs))
        raise RanksFailed(f"{script.name} {' '.join(args)}: {problem}\n{tails}")
    return outputs


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        **ALL_RANKS,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _ask(request: dict) -> str | None:
    nursery = _nursery()
    assert nursery.stdin and nursery.stdout
    nursery.stdin.write(json.dumps(request) + "\n")
    nursery.stdin.flush()
    answer = nursery.stdout.readline()
    if not answer:
        raise RanksFailed("the process that ranks are forked of has ended")
    return json.loads(answer)


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    """It ends with this process, at the end of its input."""
    command = [sys.executable, str(Path(__file__).with_name("nursery.py"))]
    environment = {**os.environ, **ALL_RANKS}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    atexit.register(process.stdin.close)
    return process
