"""Buckets in shared memory, for trainer and engines on one host: raw bytes in tmpfs, which the engines map.

Weights are copied once by the rank that owns them and once by the engine into its own tensors. The folder's name is
derived from the run's, so that the next start of a run that was killed finds what it left behind and removes it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.rollout.transports.buckets import BUCKETS_PER_RANK, Entry, SyncError

ROOT = Path("/dev/shm")


def shared_memory_folder(run_dir: Path) -> Path:
    """Where the buckets of this run live."""
    return ROOT / f"millrace-{os.getuid()}-{zlib.crc32(str(run_dir.resolve()).encode()):08x}"


class SharedMemoryCarrier:
    kind = "shared_memory"
    few_senders = False

    def __init__(self, folder: Path, rank: int, bucket_bytes: int) -> None:
        self._paths = [folder / f"{rank:05d}-{slot}.bin" for slot in range(BUCKETS_PER_RANK)]
        self._buffers: list[Tensor | None] = [None] * BUCKETS_PER_RANK
        self._backed = [0] * BUCKETS_PER_RANK
        self._bucket_bytes = bucket_bytes

    def buffer(self, slot: int, size: int) -> Tensor:
        buffer = self._buffers[slot]
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[slot] = self._map(slot, max(size, self._bucket_bytes))
        if self._backed[slot] < size:
            self._back(slot, size)
        return buffer

    def _map(self, slot: int, size: int) -> Tensor:
        with open(self._paths[slot], "ab") as file:
            file.truncate(size)
        return torch.from_file(str(self._paths[slot]), shared=True, size=size, dtype=torch.uint8)

    def _back(self, slot: int, size: int) -> None:
        # A page of tmpfs that cannot be had ends the writer with SIGBUS; asked for here, it is an error.
        with open(self._paths[slot], "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), self._backed[slot], size - self._backed[slot])
            except OSError as error:
                raise SyncError(
                    f"{ROOT} has no room for a bucket of {size / 2**20:.0f} MiB ({error.strerror}); lower "
                    "fleet.bucket_bytes, make it larger (docker run --shm-size), or use fleet.transport: disk"
                ) from error
        self._backed[slot] = size

    def describe(self, slot: int, entries: Collection[Entry]) -> Mapping[str, Any]:
        return {"file": self._paths[slot].name}

    def deliver(self, slot: int, used: int) -> None:
        """Nothing: the engines map the file."""

    def delivered(self, slot: int) -> bool:
        return True

    def close(self) -> None:
        self._buffers = [None] * BUCKETS_PER_RANK
        self._backed = [0] * BUCKETS_PER_RANK
        for path in self._paths:
            path.unlink(missing_ok=True)
