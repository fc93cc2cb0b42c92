"""One node of a job: `python -m millrace.launch.node RUN_DIR [LAST_STAGE]`, started by the scheduler once on each.

What it does stands in `node_task`. Here signals are taken from the first moment on: a warning that came while the rest
is still being imported would end the process.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

CONTINUE = 75
"""Exit code of node 0 where the run was saved because the scheduler asked for the nodes, or one of them was lost: the
job is to be put into the queue again."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(arguments: list[str]) -> int:
    asked: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    from millrace.launch.node_task import run_node

    code = run_node(Path(arguments[0]), *arguments[1:2], stop_asked=lambda: bool(asked))
    # When node 0 ends with CONTINUE, Slurm sends SIGTERM to the tasks that are still there. An interpreter that shuts
    # down has given up its handlers, and its death by the signal would be the exit code of the job.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
