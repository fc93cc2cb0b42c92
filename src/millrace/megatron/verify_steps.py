"""One rank of several verifications, one after the other: ranks take longer to start than a check of a small model.

    python -m millrace.megatron.verify_steps STEPS.json

A step is {"title": what rank 0 says before it, "arguments": those of `verify_worker`, "port": of its rendezvous}. A
check that finds a difference is on its card and the next one follows; an error ends the ranks, as it may not have met
all of them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from millrace.megatron import verify_worker
from millrace.megatron.worker import PASSED, end_with, say


def main(file: Path) -> int:
    for step in json.loads(file.read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(step["port"])
        say(step["title"])
        verify_worker.main(step["arguments"])
    return PASSED


if __name__ == "__main__":
    sys.exit(end_with(lambda: main(Path(sys.argv[1]))))
