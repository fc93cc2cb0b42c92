import signal

import pytest
import torch.distributed as dist

from millrace.stages.control import ControlGroup


@pytest.fixture
def control():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    group = ControlGroup()
    group.stop_on_signals()
    yield group
    for number, handler in before.items():
        signal.signal(number, handler)
    dist.destroy_process_group()
