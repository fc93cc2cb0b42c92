"""Buckets broadcast over NCCL: each trainer rank is rank 0 of a group with all workers of all engines.

The groups are those of vLLM's own weight-transfer plane: a rendezvous at the trainer rank, and for each engine an
offset that gives every worker of the fleet another rank. An engine that was restarted is not in a group any more, so
the groups are built anew when the engines that take part are others than before.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from millrace.rollout.transports.buckets import BUCKETS_PER_RANK, Entry
from millrace.rollout.transports.ipc import require_cuda


@dataclass(frozen=True)
class Meeting:
    """Where the workers of all engines meet one trainer rank."""

    rank: int
    address: str
    port: int
    world: int


def rank_offsets(workers: Sequence[int]) -> list[int]:
    """Rank of each engine's first worker in a group whose rank 0 is the trainer; workers: how many each engine has."""
    offsets = [1]
    for count in workers[:-1]:
        offsets.append(offsets[-1] + count)
    return offsets


class NcclCarrier:
    kind = "nccl"

    def __init__(self, rank: int, bucket_bytes: int) -> None:
        require_cuda(self.kind)
        self._rank, self._bucket_bytes = rank, bucket_bytes
        self._buffers: list[Tensor | None] = [None] * BUCKETS_PER_RANK
        self._group: Any = None

    def call_meeting(self, workers: int) -> Meeting:
        """Choose where `workers` workers meet this rank."""
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = int(probe.getsockname()[1])
        return Meeting(self._rank, address, port, 1 + workers)

    def meet(self, meeting: Meeting) -> None:
        """Build the group; returns when every worker has come."""
        from millrace.rollout.vllm_worker import meet_workers

        self._group = meet_workers(meeting)

    def buffer(self, slot: int, size: int) -> Tensor:
        buffer = self._buffers[slot]
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(max(size, self._bucket_bytes), dtype=torch.uint8, device="cuda")
            self._buffers[slot] = buffer
        return buffer

    def describe(self, slot: int, entries: Collection[Entry]) -> Mapping[str, Any]:
        return {"rank": self._rank}

    def deliver(self, slot: int, used: int) -> None:
        """Broadcast; the workers join in as soon as rank 0 has shown them the index."""
        buffer = self._buffers[slot]
        assert buffer is not None
        stream = torch.cuda.current_stream()
        self._group.broadcast(buffer[:used], src=0, stream=stream)
        stream.synchronize()

    def close(self) -> None:
        self._buffers = [None] * BUCKETS_PER_RANK
