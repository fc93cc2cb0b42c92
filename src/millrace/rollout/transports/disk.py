"""Buckets as safetensors files on a disk that trainer and engines share: works everywhere, as fast as the disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from millrace.rollout.transports.buckets import BUCKETS_PER_RANK, Entry


def disk_folder(run_dir: Path) -> Path:
    """Where the buckets of this run live."""
    return run_dir / "weights"


class DiskCarrier:
    kind = "disk"
    few_senders = False

    def __init__(self, folder: Path, rank: int, bucket_bytes: int) -> None:
        self._folder, self._rank, self._bucket_bytes = folder, rank, bucket_bytes
        self._buffer: Tensor | None = None
        self._written: list[Path | None] = [None] * BUCKETS_PER_RANK
        self._sequence = 0

    def buffer(self, slot: int, size: int) -> Tensor:
        # One buffer serves both buckets: it is free again as soon as its file is written.
        old = self._buffer
        if old is None or old.numel() < size:
            self._buffer = torch.empty(max(size, self._bucket_bytes), dtype=torch.uint8)
            if old is not None:
                self._buffer[: old.numel()] = old
        assert self._buffer is not None
        return self._buffer

    def describe(self, slot: int, entries: Collection[Entry]) -> Mapping[str, Any]:
        """Write the file. The one before it in this slot has been loaded and is removed."""
        assert self._buffer is not None
        before = self._written[slot]
        if before is not None:
            before.unlink()
        path = self._folder / f"{self._rank:05d}-{self._sequence:06d}.safetensors"
        save_file({entry.name: _tensor(self._buffer, entry) for entry in entries}, path)
        self._written[slot] = path
        self._sequence += 1
        return {"file": path.name}

    def deliver(self, slot: int, used: int) -> None:
        """Nothing: the engines read the file."""

    def delivered(self, slot: int) -> bool:
        return True

    def close(self) -> None:
        self._buffer = None
        for path in self._written:
            if path is not None:
                path.unlink(missing_ok=True)
        self._written = [None] * BUCKETS_PER_RANK


def _tensor(buffer: Tensor, entry: Entry) -> Tensor:
    piece = buffer[entry.offset : entry.offset + entry.bytes]
    return piece.view(getattr(torch, entry.dtype)).view(entry.shape)
