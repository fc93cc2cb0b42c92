"""Weights travel in buckets: the protocol between the trainer ranks that own tensors and the engines that take them.

Each rank writes the tensors it owns into buckets of its own and publishes each by a small JSON file (the index) in a
folder that all ranks, rank 0 and the engines see. Rank 0 tells the engines to load what was published, buckets of
several ranks at a time, and removes an index when all have; that frees the bucket. Each rank has two, so that it fills
one while the engines load the other. No rank ever holds more of another rank's weights than the collectives of the
export bring.

The ranks talk through the folder, not through collectives, because exporting weights is itself collective: a rank that
waited for another one inside a collective while that one waits for a free bucket would never end.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from millrace.converters.fingerprint import fingerprint
from millrace.errors import MillraceError

ALIGNMENT = 64
BUCKETS_PER_RANK = 2
BUCKETS_AT_ONCE = 4
"""So many the engines are shown together: those of several ranks are then on their way at the same time."""
ABORT = "abort"
POLL_SECONDS = 0.002
LOG_SECONDS = 10.0


class SyncError(MillraceError):
    """Weights could not be brought to the engines."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class Carrier(Protocol):
    """Where the bytes of one rank's buckets live and how an engine gets at them."""

    kind: str
    """How the index names it; the engine's receiver knows the same names."""
    few_senders: bool
    """Whether each rank that sends costs the engines something, so that as few as possible should."""

    def buffer(self, slot: int, size: int) -> Tensor:
        """uint8, at least `size` bytes of which are backed by memory: bucket `slot`, with what is in it so far."""

    def describe(self, slot: int, entries: Collection[Entry]) -> Mapping[str, Any]:
        """Finish the bucket and tell, in JSON, how to find it."""

    def deliver(self, slot: int, used: int) -> None:
        """Begin to send the bucket once its index is published, where an engine cannot fetch it by itself."""

    def delivered(self, slot: int) -> bool:
        """Whether the bucket is on its way no more. Raises SyncError when it was lost."""

    def close(self) -> None:
        """Give the memory of the buckets back."""


@dataclass
class Sent:
    """What one rank sent in one sync."""

    bytes: int = 0
    tensors: int = 0
    fingerprints: dict[str, int] = field(default_factory=dict)
    """Of the sampled tensors."""
    problem: str = ""
    """Why this rank could not send everything."""


class Outbox:
    """The sending end of one rank. `sampled(name)` says whose fingerprint is wanted."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        carrier: Carrier,
        *,
        bucket_bytes: int,
        limit: float,
        sampled: Callable[[str], bool],
    ) -> None:
        self._folder, self._rank, self._carrier = folder, rank, carrier
        self._bucket_bytes, self._limit, self._sampled = bucket_bytes, limit, sampled
        self._entries: list[Entry] = []
        self._used = 0
        self._sequence = 0
        self._pending: dict[int, Path] = {}

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> Sent:
        """Send every tensor. Iterates to the end whatever happens, since the export is collective."""
        sent = Sent()
        for name, tensor in tensors:
            if not sent.problem:
                sent.problem = self._attempt(partial(self._put, name, tensor, sent))
        if not sent.problem:
            sent.problem = self._attempt(self._drain)
        publish(self._folder / f"{self._rank:05d}.end", {"problem": sent.problem})
        return sent

    def _attempt(self, work: Callable[[], None]) -> str:
        try:
            work()
        except (OSError, SyncError) as error:
            return f"rank {self._rank} could not send weights: {error}"
        return ""

    def _put(self, name: str, tensor: Tensor, sent: Sent) -> None:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if self._used and self._used + data.numel() > self._bucket_bytes:
            self._publish()
        if not self._used:
            self._wait_free(self._sequence % BUCKETS_PER_RANK)
        buffer = self._carrier.buffer(self._sequence % BUCKETS_PER_RANK, self._used + data.numel())
        buffer[self._used : self._used + data.numel()].copy_(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._entries.append(Entry(name, dtype, tuple(tensor.shape), self._used, data.numel()))
        self._used = -(-(self._used + data.numel()) // ALIGNMENT) * ALIGNMENT
        sent.bytes += data.numel()
        sent.tensors += 1
        if self._sampled(name):
            sent.fingerprints[name] = fingerprint(tensor)

    def _publish(self) -> None:
        slot = self._sequence % BUCKETS_PER_RANK
        size = self._entries[-1].offset + self._entries[-1].bytes
        described = self._carrier.describe(slot, self._entries)
        index = self._folder / f"{self._rank:05d}-{self._sequence:06d}.json"
        tensors = [asdict(entry) for entry in self._entries]
        publish(index, {"kind": self._carrier.kind, "bytes": size, "tensors": tensors, **described})
        self._pending[slot] = index
        self._carrier.deliver(slot, size)
        self._entries, self._used = [], 0
        self._sequence += 1

    def _drain(self) -> None:
        if self._used:
            self._publish()
        for slot in range(BUCKETS_PER_RANK):
            self._wait_free(slot)

    def _wait_free(self, slot: int) -> None:
        """Wait until the engines have loaded what was last published in this bucket."""
        index = self._pending.get(slot)
        end = time.monotonic() + self._limit
        while index is not None and (index.exists() or not self._carrier.delivered(slot)):
            if (self._folder / ABORT).exists():
                raise SyncError(json.loads((self._folder / ABORT).read_text())["problem"])
            if time.monotonic() > end:
                raise SyncError(f"the engines did not take {index.name} within {self._limit:g} s")
            time.sleep(POLL_SECONDS)


class Feeder:
    """The receiving end on rank 0: shows published buckets to the engines until every rank has sent its last."""

    def __init__(
        self, folder: Path, ranks: int, load: Callable[[list[Path], list[str]], Awaitable[None]], limit: float
    ) -> None:
        """`load(indexes, names)` is awaited for a few buckets at a time; limit: seconds without any bucket."""
        self._folder, self._ranks, self._load, self._limit = folder, ranks, load, limit
        self._shown: dict[str, int] = {}
        """How many buckets of each rank were shown."""

    async def run(self) -> None:
        """Raises SyncError when a rank falls silent, and what `load` raises, after telling the ranks to stop."""
        finished = False
        try:
            await self._run()
            finished = True
        finally:
            if not finished:
                publish(self._folder / ABORT, {"problem": "the engines take no more weights; rank 0 says why"})

    async def _run(self) -> None:
        heard = time.monotonic()
        while True:
            names = os.listdir(self._folder)
            published = self._in_turn(name for name in names if name.endswith(".json"))
            ended = sum(name.endswith(".end") for name in names)
            for first in range(0, len(published), BUCKETS_AT_ONCE):
                await self._show([self._folder / name for name in published[first : first + BUCKETS_AT_ONCE]])
                heard = time.monotonic()
            if not published and ended == self._ranks:
                return
            if time.monotonic() - heard > self._limit:
                raise SyncError(
                    f"{self._ranks - ended} of {self._ranks} trainer ranks sent nothing for {self._limit:g} s"
                )
            await asyncio.sleep(POLL_SECONDS)

    def _in_turn(self, names: Iterable[str]) -> list[str]:
        """The indexes to show now, those of different ranks next to each other. A listing may hold a rank's later one
        and not yet an earlier one, but what is broadcast must be taken in the order in which it is sent."""
        chosen = []
        for sequence, rank, name in sorted((*reversed(Path(name).stem.split("-")), name) for name in names):
            if int(sequence) == self._shown.get(rank, 0):
                self._shown[rank] = int(sequence) + 1
                chosen.append(name)
        return chosen

    async def _show(self, indexes: list[Path]) -> None:
        names = [entry["name"] for index in indexes for entry in json.loads(index.read_text())["tensors"]]
        await self._load(indexes, names)
        for index in indexes:
            index.unlink()


def publish(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file so that nobody ever sees half of it."""
    aside = path.with_suffix(path.suffix + ".tmp")
    aside.write_text(json.dumps(content))
    aside.rename(path)


def clear(folder: Path) -> None:
    """Make `folder` empty: what a sync that broke off, or a run that was killed, has left there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
