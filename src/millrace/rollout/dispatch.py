"""Gives jobs to engines: each to the least loaded one that serves, and once more to another when an engine fails.

There is one dispatcher a fleet, for batches of answers, single turns of episodes and scoring. They go to the engines in
the order they came in, but turns before all others: an episode has many of them, one after the other, while a batch is
done when its last job is. A job that fails for good costs only itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from millrace.rollout.client import EngineClient, EngineUnreachable, RequestAborted, RequestTimeout
from millrace.rollout.fleet_health import Event, Overdue, Suspected
from millrace.rollout.member import FleetError, Member

T = TypeVar("T")

MAX_FAILURES = 4
"""So often one job may fail, each time perhaps with another engine, before the call that brought it fails."""
POLL_SECONDS = 0.1
"""How often engines that came back are looked for while jobs wait."""


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


@dataclass
class _Ticket:
    """A job on its way."""

    job: Job[Any]
    future: asyncio.Future[Any]
    queue: deque[_Ticket]
    """Where it waits."""
    failures: int = 0

    def again(self) -> None:
        self.queue.appendleft(self)


class Dispatcher:
    """All methods are called in the fleet's thread.

    Args:
        capacity: sequences that an engine is given at one time.
        limit: an engine none of whose jobs came back for so many seconds is reported when one of them times out.
    """

    def __init__(self, pool: Pool, *, capacity: int, limit: float) -> None:
        self._pool, self._capacity, self._limit = pool, capacity, limit
        self._turns: deque[_Ticket] = deque()
        self._others: deque[_Ticket] = deque()
        self._running = 0
        self._pump: asyncio.Task[None] | None = None

    def submit(self, job: Job[T], *, turn: bool = False) -> asyncio.Future[tuple[T, str]]:
        """A future of the job's result and the URL of the engine that gave it; to cancel it takes the job back.

        It fails with RequestRefused, with FleetError when the job failed too often, and with what `engine_available`
        raises.
        """
        queue = self._turns if turn else self._others
        ticket = _Ticket(job, asyncio.get_running_loop().create_future(), queue)
        queue.append(ticket)
        self._start_jobs()
        return ticket.future

    async def gather(self, jobs: Sequence[Job[T]], take: Callable[[int, T, str], None]) -> None:
        """Run jobs to their end; `take(job index, result, engine url)` is called as each one comes back. When one
        fails, the others are taken back."""

        async def run(index: int, job: Job[T]) -> None:
            result, url = await self.submit(job)
            take(index, result, url)

        tasks = [asyncio.ensure_future(run(index, job)) for index, job in enumerate(jobs)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Wait for engines no more."""
        if self._pump is not None:
            self._pump.cancel()

    @property
    def _waiting(self) -> deque[_Ticket]:
        """Where the next job comes from; empty when none waits."""
        return self._turns or self._others

    def _start_jobs(self) -> None:
        while self._waiting:
            free = [m for m in self._pool.members if m.serving and m.outstanding < self._capacity]
            if not free:
                break
            ticket = self._waiting.popleft()
            if not ticket.future.done():
                self._start(ticket, min(free, key=lambda m: m.outstanding))
        if self._waiting and self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._wait_for_engines())
            self._pump.add_done_callback(self._pump_ended)

    def _start(self, ticket: _Ticket, member: Member) -> None:
        task = asyncio.ensure_future(ticket.job.call(member.client))
        if not member.tasks:
            member.progressed_at = time.monotonic()
        member.tasks.add(task)
        member.outstanding += ticket.job.sequences
        self._running += 1

        def give_up(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                task.cancel()

        ticket.future.add_done_callback(give_up)
        task.add_done_callback(lambda _: ticket.future.remove_done_callback(give_up))
        task.add_done_callback(lambda _: self._ended(task, ticket, member))

    async def _wait_for_engines(self) -> None:
        while self._waiting:
            if not self._running:  # those that run end by themselves, or are taken from an engine that dies
                await self._pool.engine_available()
            self._start_jobs()
            if self._waiting:
                await asyncio.sleep(POLL_SECONDS)

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        """No engine is to be had: that is the end of all that wait."""
        self._pump = None
        error = None if pump.cancelled() else pump.exception()
        while error is not None and self._waiting:
            ticket = self._waiting.popleft()
            if not ticket.future.done():
                ticket.future.set_exception(error)

    def _ended(self, task: asyncio.Future[Any], ticket: _Ticket, member: Member) -> None:
        member.tasks.discard(task)
        member.outstanding -= ticket.job.sequences
        self._running -= 1
        if not ticket.future.done():
            self._settle(task, ticket, member)
        elif not task.cancelled():
            task.exception()  # nobody asks for it any more
        self._start_jobs()

    def _settle(self, task: asyncio.Future[Any], ticket: _Ticket, member: Member) -> None:
        if task.cancelled():  # its engine died; the job is not to blame
            ticket.again()
            return
        error = task.exception()
        if error is None:
            member.progressed_at = time.monotonic()
            ticket.future.set_result((task.result(), member.client.url))
        elif isinstance(error, RequestAborted):
            ticket.again()
        elif isinstance(error, EngineUnreachable | RequestTimeout):
            self._retry(ticket, member, error)
        else:
            ticket.future.set_exception(error)

    def _retry(self, ticket: _Ticket, member: Member, error: EngineUnreachable | RequestTimeout) -> None:
        if isinstance(error, EngineUnreachable):
            self._pool.report(member, Suspected())
        elif time.monotonic() - member.progressed_at >= self._limit:
            self._pool.report(member, Overdue(f"none of its requests came back within {self._limit:g} s"))
        ticket.failures += 1
        if ticket.failures < MAX_FAILURES:
            ticket.again()
            return
        failed = FleetError(
            f"{ticket.job.name} failed {MAX_FAILURES} times, last: {error}. If the answers are merely long, raise "
            "fleet.request_timeout_s"
        )
        failed.__cause__ = error
        ticket.future.set_exception(failed)
