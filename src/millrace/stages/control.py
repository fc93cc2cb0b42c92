"""Small messages between the trainer's ranks: rank 0 talks to fleet and verifiers, the others follow.

The control group is apart from the groups that train: a rank may wait in it for as long as a batch of rollouts takes,
and it stays on CPU where the others use NCCL.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from millrace.data.batch import TokenBatch

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=24)
"""Rank 0 has its own, named limits on what it waits for; this one only ends orphans."""


class Stopped(Exception):
    """The run was asked to stop."""


class Control(Protocol):
    """What playing episodes needs of the ranks around it."""

    def on_main_until_stopped(self, function: Callable[[], T]) -> T: ...


class NoTrainer:
    """The control of one process that plays episodes without a trainer. Ctrl-C is a KeyboardInterrupt there."""

    def on_main_until_stopped(self, function: Callable[[], T]) -> T:
        return function()


class ControlGroup:
    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self.rank = dist.get_rank()
        self.is_main = self.rank == 0
        self._stop_asked = False
        self._interruptible = False

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on every rank."""
        box: list[T | None] = [function() if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return cast(T, box[0])

    def on_main_until_stopped(self, function: Callable[[], T]) -> T:
        """Like `on_main`, for a long wait that may be left half-way: when rank 0 was asked to stop, before or while it
        waits, Stopped is raised on every rank. `function` sees a KeyboardInterrupt."""
        result, stopped = self.on_main(lambda: self._until_stopped(function))
        if stopped:
            raise Stopped
        return cast(T, result)

    def _until_stopped(self, function: Callable[[], T]) -> tuple[T | None, bool]:
        """The result, and whether it was given up for a stop."""
        try:
            self._interruptible = True
            if self._stop_asked:
                return None, True
            return function(), False
        except KeyboardInterrupt:
            return None, True
        finally:
            self._interruptible = False

    def broadcast_batch(self, batch: TokenBatch | None) -> TokenBatch:
        """Rank 0's batch on every rank, as plain tensors."""
        n, b, streams = self.on_main(lambda: _extent(batch))
        if batch is None:
            tokens, lengths = torch.empty(n, dtype=torch.int64), torch.empty(b, dtype=torch.int64)
            values = torch.empty(len(streams), n)
        else:
            tokens, lengths = batch.tokens, batch.lengths
            values = torch.stack([batch.streams[name] for name in streams])
        for tensor in (tokens, lengths, values):
            dist.broadcast(tensor, src=0, group=self.group)
        return TokenBatch(tokens, lengths, dict(zip(streams, values, strict=True)))

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    # ---- stopping

    def ask_to_stop(self) -> None:
        self._stop_asked = True

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank."""
        flag = torch.tensor([int(self._stop_asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def stop_on_signals(self) -> None:
        """SIGINT, SIGTERM and SIGUSR1 (a scheduler's warning) end the run, saved: an update in progress is finished,
        rollouts and waits are left."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask_to_stop()
        if self._interruptible:
            self._interruptible = False  # once: what ends the wait is not interrupted in turn
            raise KeyboardInterrupt


def _extent(batch: TokenBatch | None) -> tuple[int, int, list[str]]:
    """Tokens, sequences and names of the streams."""
    assert batch is not None, "rank 0 gives the batch"
    return batch.tokens.numel(), len(batch), sorted(batch.streams)
