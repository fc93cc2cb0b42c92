"""A process of which the tests' ranks are forked: it has imported what all of them need, which takes longer than what a
tiny model does afterwards.

Each line of its input asks for the ranks of a script; a line of its output tells, when they have ended, what went
wrong.
"""

from __future__ import annotations

import gc
import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        problem = run(request["script"], request["arguments"], request["ranks"], request["timeout"])
        sys.stdout.write(json.dumps(problem) + "\n")
        sys.stdout.flush()


def run(script: str, arguments: list[str], ranks: list[dict], timeout: float) -> str | None:
    """Fork the ranks and wait for them; the first one that fails, or the time limit, ends all of them."""
    running = {fork(script, arguments, **rank): number for number, rank in enumerate(ranks)}
    deadline = time.monotonic() + timeout
    try:
        while running:
            for pid, number in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del running[pid]
                    if status:
                        return f"rank {number} ended with exit code {os.waitstatus_to_exitcode(status)}"
            if time.monotonic() > deadline:
                return f"ranks {sorted(running.values())} did not end within {timeout:g} s"
            time.sleep(0.02)
        return None
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def fork(script: str, arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Its process id. In the child this never returns: there the script runs as the main program."""
    pid = os.fork()
    if pid:
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    random.seed()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    gc.disable()
    import millrace.megatron.checkpoint
    import millrace.megatron.policy  # noqa: F401

    gc.freeze()
    gc.enable()
    main()
