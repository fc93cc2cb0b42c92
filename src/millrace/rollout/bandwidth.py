"""How long the slowest link on the way to the engines would need for a weight sync, to tell a slow one by.

Every worker of every engine takes all bytes over its own link, and all of them at the same time; so the time is that of
all bytes over the slowest of these links, whatever the number of senders and engines. On a cluster the links are those
of its file; elsewhere they are measured, once, with what the transport does: a copy in memory, a file written and read,
a stream over the loopback, a copy in the GPU's memory.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from millrace.config.schema import FleetConfig
from millrace.rollout.rendezvous import Rendezvous

MEASURED_BYTES = 32 << 20
MEASURED_ROUNDS = 3
GB = 1e9


@dataclass(frozen=True)
class Link:
    name: str
    gb_s: float

    def seconds(self, count: int) -> float:
        """How long it takes for so many bytes."""
        return count / GB / self.gb_s


def slowest_link(config: FleetConfig, folder: Path, meeting: Rendezvous | None) -> Link:
    """The slowest link of a worker on the way from the trainer; `folder` is where buckets are announced, `meeting` that
    of a job on a cluster."""
    match config.transport:
        case "shared_memory":
            return Link("a copy in memory", _measured(_copy("cpu")))
        case "disk":
            return Link("a file written and read", _measured(_file(folder)))
        case "gloo" | "nccl" if meeting is not None and _leaves_node(meeting):
            return Link("the network between nodes", meeting.network.inter_node_gb_s)
        case "nccl" | "ipc" if meeting is not None:
            return Link("the links between a node's GPUs", meeting.network.intra_node_gb_s)
        case "gloo":
            return Link("a stream over the loopback", _measured(_loopback))
        case _:
            return Link("a copy in the GPU's memory", _measured(_copy("cuda")))


def _leaves_node(meeting: Rendezvous) -> bool:
    placement = meeting.placement
    engines = {server.node for server in placement.servers_of("engine")}
    return len(engines | {ranks.node for ranks in placement.trainer}) > 1


def _measured(work: Callable[[], None]) -> float:
    """GB/s at which `work` moves MEASURED_BYTES, the best of a few rounds."""
    seconds = []
    for _ in range(MEASURED_ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return MEASURED_BYTES / GB / min(seconds)


def _copy(device: str) -> Callable[[], None]:
    source = torch.zeros(MEASURED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return copy


def _file(folder: Path) -> Callable[[], None]:
    content = bytes(MEASURED_BYTES)

    def write_and_read() -> None:
        path = folder / "speed.tmp"
        path.write_bytes(content)
        path.read_bytes()
        path.unlink()

    return write_and_read


def _loopback() -> None:
    content, arrived = bytes(MEASURED_BYTES), bytearray(MEASURED_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            sending = threading.Thread(target=sender.sendall, args=(content,))
            sending.start()
            view, count = memoryview(arrived), 0
            while count < MEASURED_BYTES:
                count += receiver.recv_into(view[count:])
            sending.join()
