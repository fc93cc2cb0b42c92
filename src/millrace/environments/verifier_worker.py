"""A process that runs one verifier: `python -m millrace.environments.verifier_worker MODULE:FUNCTION MEMORY_BYTES`.

It reads one JSON line {"arguments": [...], "limit_s": ...} after the other and answers each with a line of JSON, the
function's result. It ends when its input closes, so it never outlives its owner; a call that hangs, even in C code, is
ended by the kernel's alarm a moment after its limit, should the owner be gone and nobody kill it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from typing import TextIO

ORPHAN_GRACE_S = 2.0
"""The owner kills at the limit; the alarm only ends a worker whose owner died."""


def main() -> None:
    # A scheduler signals every process of its job. Dying of it in the middle of an item would be taken for the item's
    # fault; this process ends with its owner.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    target, memory_bytes = sys.argv[1], int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    module, function = target.split(":")
    verify = getattr(importlib.import_module(module), function)
    _reply(replies, "ready")
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"] + ORPHAN_GRACE_S)
        result = verify(*request["arguments"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, result)


def _reply(replies: TextIO, result: object) -> None:
    replies.write(json.dumps(result) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
