"""A node that verifies: the server of programs that runs there (`environments.sandbox.serve`), as long as the job does.

A server that ends is started again; verifiers of the run give its programs to others meanwhile.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from millrace.config.placement import VerifierPlace
from millrace.environments.sandbox.remote import server_file
from millrace.rollout.rendezvous import Rendezvous

MOST_RESTARTS = 3
POLL_SECONDS = 0.2

log = logging.getLogger("millrace.rollout")


def serve_programs(
    run_dir: Path,
    meeting: Rendezvous,
    place: VerifierPlace,
    address: str,
    over: Callable[[], bool],
    stop_asked: Callable[[], bool],
) -> None:
    """Serve until `over()`. Call it in a thread that lives as long as the server should: the kernel ends it with that.

    A server that has ended too often, or after a stop was asked for, stays away.
    """
    log_path = run_dir / "logs" / f"verifier-{place.node}.log"
    for starts in range(1 + MOST_RESTARTS):
        process = _start(meeting, place, address, log_path)
        while process.poll() is None and not over():
            time.sleep(POLL_SECONDS)
        server_file(meeting, place.node).unlink(missing_ok=True)  # its port may get another owner
        if over():
            process.terminate()
            process.wait()  # the supervisor kills what does not end by itself
            return
        again = starts < MOST_RESTARTS and not stop_asked()
        what = f"it {'starts' if again else 'is not started'} again; see {log_path}"
        log.warning("the verifier of node %d ended with %d; %s", place.node, process.returncode, what)
        if not again:
            return


def _start(meeting: Rendezvous, place: VerifierPlace, address: str, log_path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "millrace.rollout.supervisor", str(os.getpid())]
    command += [sys.executable, "-m", "millrace.environments.sandbox.serve"]
    command += [str(meeting.folder), str(place.node), address, str(place.workers)]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
