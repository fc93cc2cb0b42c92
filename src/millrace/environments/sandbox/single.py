"""One run in a process of its own: `python -P -s -S -B -c ... HOW JOB STARTED SCRATCH FILES`.

HOW is `bubblewrap` (the process is in the box already), `landlock` (it makes the box here) or `none`. JOB and STARTED
are descriptors of the job and of the pipe that is told when the program begins, FILES those of the job's files;
standard streams are the program's. A compiler's folder is the descriptor SCRATCH, or the one of the box where it is -.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn

from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.collect import STARTED
from millrace.environments.sandbox.confine import allow_files_only, arrange, become_nobody, refuse_calls, set_limits
from millrace.environments.sandbox.namespaces import DEVICES, SCRATCH, SYSTEM_FILES, SYSTEM_FOLDERS, interpreter_folder
from millrace.environments.sandbox.run import Limits
from millrace.environments.sandbox.work import FIRST_FILE, compiles, do_work, filter_of


def main() -> NoReturn:
    how, job, started, scratch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    files = [int(descriptor) for descriptor in sys.argv[5:]]
    sys.path.pop(0)  # the way to Millrace itself
    with open(job, "rb") as file:
        header = json.loads(file.read())
    writes = compiles(header["work"])
    if writes:
        os.chdir(SCRATCH if scratch == "-" else int(scratch))
    arrange([0, 1, 2, started, *files])
    if how == "landlock":
        become_nobody()
        if os.geteuid() == 0:
            kernel.lock_privileges()
            kernel.drop_capabilities()
        readable = (*SYSTEM_FOLDERS, *SYSTEM_FILES, interpreter_folder())
        allow_files_only(readable, DEVICES, writable="." if writes else None)
    kernel.die_with_parent(signal.SIGKILL)
    set_limits(Limits(**header["limits"]), header["processes"])
    if how != "none":
        refuse_calls(os.getpid(), profile=filter_of(header["work"]))
    os.write(3, STARTED)
    os.close(3)
    do_work(header["work"], range(FIRST_FILE, FIRST_FILE + len(files)))
