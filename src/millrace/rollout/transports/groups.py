"""Where a trainer rank meets the workers of all engines: a group in which the rank is 0 and only it sends.

One group for each sending rank, so that ranks send at the same time. An engine that was restarted is not in a group any
more, so groups are built anew when the engines that take part are others than before. What a group is made of differs
by device alone: gloo here, NCCL by vLLM's own communicator (`vllm_worker.NcclGroup`).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroupGloo

from millrace.ports import free_port

T = TypeVar("T")


@dataclass(frozen=True)
class Meeting:
    """Where the workers of all engines meet one trainer rank."""

    kind: str
    """What the group is made of: `gloo` or `nccl`."""
    rank: int
    address: str
    port: int
    world: int


class Transfer(Protocol):
    """One broadcast under way."""

    def done(self) -> bool:
        """Whether it has ended; raises when it failed."""

    def wait(self) -> None:
        """Let what this process does from now on see what arrived."""


class Group(Protocol):
    def broadcast(self, data: Tensor) -> Transfer:
        """Begin to send `data` on rank 0, to fill it on the others. All ranks begin theirs in the same order."""

    def close(self) -> None:
        """End the group, also with a broadcast under way."""


def rank_offsets(workers: Sequence[int]) -> list[int]:
    """Rank of each engine's first worker in a group whose rank 0 is the trainer; workers: how many each engine has."""
    offsets = [1]
    for count in workers[:-1]:
        offsets.append(offsets[-1] + count)
    return offsets


def call_meeting(kind: str, rank: int, workers: int, urls: Sequence[str]) -> Meeting:
    """Choose where `workers` workers of the engines at `urls` meet this rank."""
    address = address_towards([urlsplit(url).hostname or "" for url in urls])
    return Meeting(kind, rank, address, free_port(address), 1 + workers)


def address_towards(hosts: Sequence[str]) -> str:
    """The address of this host on the way to `hosts`: the loopback only if all of them are this host by that name."""
    seen = "127.0.0.1"
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: it only asks for the route
            seen = str(probe.getsockname()[0])
        if not seen.startswith("127."):
            break
    return seen


def within(limit: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, in a thread of its own; TimeoutError, and the thread left to itself, when it takes
    more than `limit` seconds."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  it is raised where the result is asked for
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([outcome], limit).done:
        raise TimeoutError(f"it was not done within {limit:g} s")
    return outcome.result()


class GlooGroup:
    def __init__(self, meeting: Meeting, rank: int, limit: float) -> None:
        """Returns when all ranks have come; `limit`: seconds that they and each broadcast may take."""
        timeout = timedelta(seconds=limit)
        self._store = dist.TCPStore(meeting.address, meeting.port, meeting.world, rank == 0, timeout)
        gloo: Any = ProcessGroupGloo  # torch's stubs know little of it
        options = gloo._Options()
        own = meeting.address if rank == 0 else address_towards([meeting.address])
        options._devices = [gloo.create_device(hostname=own)]
        options._timeout = timeout
        self._group = gloo(dist.PrefixStore("weights", self._store), rank, meeting.world, options)

    def broadcast(self, data: Tensor) -> Transfer:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return GlooTransfer(self._group.broadcast([data], options))

    def close(self) -> None:
        self._group.shutdown()


class GlooTransfer:
    def __init__(self, work: Any) -> None:
        self._work = work

    def done(self) -> bool:
        if not self._work.is_completed():
            return False
        self._work.wait()  # raises what went wrong
        return True

    def wait(self) -> None:
        self._work.wait()
