import os
import sys
from typing import Any

from millrace.converters.processes import Workers, alone


def parent_and_megatron(job: object = None) -> tuple[int, bool]:
    return os.getppid(), "megatron.core" in sys.modules


def test_all_processes_are_forked_from_one_server_without_megatron():
    found: list[Any] = []
    with Workers(2) as workers:
        with alone(parent_and_megatron) as asked:
            pass
        workers.run(parent_and_megatron, range(4), lambda count: None, lambda job, result: found.append(result))
    server, megatron = asked.result()
    assert server != os.getpid() and not megatron
    assert found == [(server, False)] * 4
