"""Buckets broadcast from the trainer rank that fills them to all workers of all engines: NCCL on GPUs, gloo on CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from millrace.rollout.transports.buckets import BUCKETS_PER_RANK, Entry, SyncError
from millrace.rollout.transports.groups import GlooGroup, Group, Meeting, Transfer
from millrace.rollout.transports.ipc import require_cuda

BROADCAST = ("nccl", "gloo")
"""The transports that send, instead of letting engines fetch."""
Join = Callable[[Meeting, int, float], Group]
"""Become a rank of the group that meets at a place; seconds that this and each broadcast may take."""


class BroadcastCarrier:
    few_senders = True  # each has a communicator in every worker

    def __init__(self, kind: Literal["nccl", "gloo"], rank: int, bucket_bytes: int, limit: float) -> None:
        if kind == "nccl":
            require_cuda(kind)
        self.kind: str = kind
        self._device = "cuda" if kind == "nccl" else "cpu"
        self._rank, self._bucket_bytes, self._limit = rank, bucket_bytes, limit
        self._buffers: list[Tensor | None] = [None] * BUCKETS_PER_RANK
        self._transfers: list[Transfer | None] = [None] * BUCKETS_PER_RANK
        self._group: Group | None = None

    def meet(self, meeting: Meeting | None) -> str:
        """Build the group anew, when every worker has come; why it could not be built, or nothing.

        None: this rank has nothing to send.
        """
        if self._group is not None:
            self._group.close()
        self._group = None
        if meeting is not None:
            try:
                self._group = joiner(self.kind)(meeting, 0, self._limit)
            except (RuntimeError, OSError) as error:  # what torch, vLLM and a time limit raise when ranks stay away
                return f"rank {self._rank} did not meet the engines at {meeting.address}:{meeting.port}: {error}"
        return ""

    def buffer(self, slot: int, size: int) -> Tensor:
        buffer = self._buffers[slot]
        if buffer is None or buffer.numel() < size:
            new = torch.empty(max(size, self._bucket_bytes), dtype=torch.uint8, device=self._device)
            if buffer is not None:
                new[: buffer.numel()] = buffer
            self._buffers[slot] = buffer = new
        return buffer

    def describe(self, slot: int, entries: Collection[Entry]) -> Mapping[str, Any]:
        return {"rank": self._rank}

    def deliver(self, slot: int, used: int) -> None:
        """Begin to broadcast; the workers join in as soon as rank 0 has shown them the index."""
        buffer = self._buffers[slot]
        assert buffer is not None and self._group is not None
        self._transfers[slot] = self._group.broadcast(buffer[:used])

    def delivered(self, slot: int) -> bool:
        transfer = self._transfers[slot]
        try:
            return transfer is None or transfer.done()
        except RuntimeError as error:
            raise SyncError(f"a bucket did not reach all engines: {error}") from error

    def close(self) -> None:
        """Give the buckets' memory back, and end a group in which a broadcast broke off: it is of no use any more, and
        on a GPU the broadcast would hold up whoever waits for the whole device."""
        if self._group is not None and not all(map(self._arrived, range(BUCKETS_PER_RANK))):
            self._group.close()
            self._group = None
        self._buffers = [None] * BUCKETS_PER_RANK
        self._transfers = [None] * BUCKETS_PER_RANK

    def _arrived(self, slot: int) -> bool:
        try:
            return self.delivered(slot)
        except SyncError:
            return False


def joiner(kind: str) -> Join:
    """How a group of this kind is joined."""
    if kind == "gloo":
        return GlooGroup
    from millrace.rollout.vllm_worker import NcclGroup  # vLLM's communicator

    return NcclGroup
