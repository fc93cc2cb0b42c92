"""Gives jobs to engines: each to the least loaded one that serves, and once more to another when an engine fails."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from millrace.rollout.client import EngineClient, EngineUnreachable, RequestAborted, RequestTimeout
from millrace.rollout.fleet_health import Event, Overdue, Suspected
from millrace.rollout.member import FleetError, Member

T = TypeVar("T")

MAX_FAILURES = 4
"""So often one job may fail, each time perhaps with another engine, before the call that brought it fails."""
POLL_SECONDS = 0.1
"""How often engines that came back are looked for while requests are under way."""


class Pool(Protocol):
    """What a dispatcher needs to know of the fleet."""

    @property
    def members(self) -> Sequence[Member]: ...

    def report(self, member: Member, event: Event) -> None:
        """Tell the state machine of an engine what happened."""

    async def engine_available(self) -> None:
        """Return when an engine serves; raise FleetNeedsSync or FleetLost when waiting would not help."""


@dataclass(frozen=True)
class Job(Generic[T]):
    name: str
    """What the job is, for messages."""
    sequences: int
    """Its load: sequences that an engine decodes for it."""
    call: Callable[[EngineClient], Awaitable[T]]


class Dispatcher(Generic[T]):
    """Runs jobs to their end. `on_result(job index, result, engine url)` is called as each one comes back."""

    def __init__(
        self,
        pool: Pool,
        jobs: Sequence[Job[T]],
        on_result: Callable[[int, T, str], None],
        *,
        capacity: int,
        limit: float,
    ) -> None:
        self._pool = pool
        self._jobs = jobs
        self._on_result = on_result
        self._capacity = capacity
        self._limit = limit
        self._waiting = deque(range(len(jobs)))
        self._running: dict[asyncio.Task[T], tuple[int, Member]] = {}
        self._failures = [0] * len(jobs)

    async def run(self) -> None:
        """Raises RequestRefused, FleetError when a job failed too often, and what `engine_available` raises."""
        try:
            while self._waiting or self._running:
                self._start_jobs()
                if not self._running:
                    await self._pool.engine_available()
                    self._start_jobs()
                    if not self._running:  # the engines that serve are full with another dispatcher's jobs
                        await asyncio.sleep(POLL_SECONDS)
                    continue
                done, _ = await asyncio.wait(self._running, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    self._finish(task)
        finally:
            await self._cancel_running()

    def _start_jobs(self) -> None:
        while self._waiting:
            free = [m for m in self._pool.members if m.serving and m.outstanding < self._capacity]
            if not free:
                return
            member = min(free, key=lambda m: m.outstanding)
            index = self._waiting.popleft()
            task = asyncio.ensure_future(self._jobs[index].call(member.client))
            if not member.tasks:
                member.progressed_at = time.monotonic()
            member.tasks.add(task)
            member.outstanding += self._jobs[index].sequences
            self._running[task] = (index, member)

    def _finish(self, task: asyncio.Task[T]) -> None:
        index, member = self._release(task)
        if task.cancelled():  # its engine died; the job is not to blame
            self._waiting.appendleft(index)
            return
        error = task.exception()
        if error is None:
            member.progressed_at = time.monotonic()
            self._on_result(index, task.result(), member.client.url)
        elif isinstance(error, RequestAborted):
            self._waiting.appendleft(index)
        elif isinstance(error, EngineUnreachable | RequestTimeout):
            self._retry(index, member, error)
        else:
            raise error

    def _retry(self, index: int, member: Member, error: EngineUnreachable | RequestTimeout) -> None:
        if isinstance(error, EngineUnreachable):
            self._pool.report(member, Suspected())
        elif time.monotonic() - member.progressed_at >= self._limit:
            self._pool.report(member, Overdue(f"none of its requests came back within {self._limit:g} s"))
        self._failures[index] += 1
        if self._failures[index] >= MAX_FAILURES:
            raise FleetError(
                f"{self._jobs[index].name} failed {MAX_FAILURES} times, last: {error}. If the answers are merely long, "
                "raise fleet.request_timeout_s"
            ) from error
        self._waiting.appendleft(index)

    def _release(self, task: asyncio.Task[T]) -> tuple[int, Member]:
        index, member = self._running.pop(task)
        member.tasks.discard(task)
        member.outstanding -= self._jobs[index].sequences
        return index, member

    async def _cancel_running(self) -> None:
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
            self._release(task)
        await asyncio.gather(*tasks, return_exceptions=True)
