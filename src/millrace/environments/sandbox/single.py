"""One run in a process of its own: `python -P -s -S -B -c ... HOW JOB STARTED`.

HOW is `bubblewrap` (the process is in the box already), `landlock` (it makes the box here) or `none`. JOB and STARTED
are descriptors of the job and of the pipe that is told when the program begins; standard streams are the program's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn

from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.collect import STARTED
from millrace.environments.sandbox.confine import allow_files_only, become_nobody, close_from, refuse_calls, set_limits
from millrace.environments.sandbox.namespaces import DEVICES, SYSTEM_FILES, SYSTEM_FOLDERS, interpreter_folder
from millrace.environments.sandbox.program import run_program
from millrace.environments.sandbox.run import Limits, Program


def main() -> NoReturn:
    how, job, started = sys.argv[1], int(sys.argv[2]), os.dup2(int(sys.argv[3]), 63)
    sys.path.pop(0)  # the way to Millrace itself
    with open(job, "rb") as file:
        header = json.loads(file.read())
    os.dup2(started, 3)
    close_from(4)
    if how == "landlock":
        os.chdir("/")
        become_nobody()
        if os.geteuid() == 0:
            kernel.lock_privileges()
            kernel.drop_capabilities()
        allow_files_only((*SYSTEM_FOLDERS, *SYSTEM_FILES, interpreter_folder()), DEVICES)
    kernel.die_with_parent(signal.SIGKILL)
    set_limits(Limits(**header["limits"]), header["processes"])
    if how != "none":
        refuse_calls(os.getpid())
    os.write(3, STARTED)
    os.close(3)
    run_program(Program(**header["program"]))
