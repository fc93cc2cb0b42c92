"""Where programs are tested, and which place takes the next one.

A place is the workers of one machine: this one (`LocalPlace`), or a node that verifies for the run (`remote`). Each has
so many programs in hand that its workers find the next one at once; the others wait in one queue before all places,
where they cost nothing, and go to the place that has the least to do for its size.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from millrace.environments.sandbox.cpp import require_compiler
from millrace.environments.sandbox.tiers import choose_tier
from millrace.environments.verifier_pool import Verdict, VerifierPool

CHECK = "millrace.environments.sandbox.check:check"

START_S = 300.0
"""How long the boxes of a worker may take to open before it counts as stuck."""

WORKER_BYTES = 8 << 30
"""Address space of a worker; a box's programs are its children and can have no more."""

QUEUED_PER_WORKER = 2
"""Programs handed to a place beyond what runs."""

LOOK_S = 1.0
ALL_LOST_S = 60.0
"""How long programs wait where every place is lost; a node starts its server anew within seconds."""


class Place(Protocol):
    """The workers of one machine."""

    name: str
    tier: str
    """Of its boxes."""
    workers: int

    @property
    def ready(self) -> bool:
        """Whether it takes programs now."""

    def open(self, changed: Callable[[], None]) -> None:
        """Called once, in the event loop; `changed` is to be called when the place has become ready."""

    async def verify(self, job: Mapping[str, Any], limit_s: float) -> Verdict:
        """A worker's report on a job, in a box of this place's tier."""

    async def close(self) -> None: ...


class NoPlaceError(Exception):
    """Every place is lost, for longer than its servers take to start anew."""


def worker_pool(workers: int) -> VerifierPool:
    return VerifierPool(CHECK, workers=workers, limit_s=START_S, memory_bytes=WORKER_BYTES)


class LocalPlace:
    """Workers of this machine, as many as there are processors when None.

    Raises:
        NoSandboxError: the tier cannot be used here, or (`compiles`) C++ cannot be compiled in it.
    """

    name = "this machine"
    ready = True

    def __init__(self, tier: str, workers: int | None, *, compiles: bool) -> None:
        self.tier = choose_tier(tier)
        if compiles:
            require_compiler(self.tier)
        self.workers = workers or os.cpu_count() or 1
        self.pool = worker_pool(self.workers)

    def open(self, changed: Callable[[], None]) -> None:
        """Nothing: its processes start with the first program."""

    async def verify(self, job: Mapping[str, Any], limit_s: float) -> Verdict:
        return await self.pool.verify({**job, "tier": self.tier}, limit_s=limit_s)

    async def close(self) -> None:
        await self.pool.close()


class Queue:
    """The programs that wait, before all places."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._held = dict.fromkeys(places, 0)
        self._waiting: deque[asyncio.Future[Place]] = deque()
        self._opened = False

    async def take(self) -> Place:
        """A place that has room, once there is one; `give_back` it.

        Raises:
            NoPlaceError
        """
        if not self._opened:
            self._opened = True
            for place in self._held:
                place.open(self._hand_out)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._hand_out()
        try:
            await self._wait(turn)
        except BaseException:
            if not turn.cancel():  # it had its turn in the same moment
                self.give_back(turn.result())
            raise
        return turn.result()

    def give_back(self, place: Place) -> None:
        self._held[place] -= 1
        self._hand_out()

    async def _wait(self, turn: asyncio.Future[Place]) -> None:
        lost_s = 0.0
        while not turn.done():
            await asyncio.wait({turn}, timeout=LOOK_S)
            lost_s = 0.0 if any(place.ready for place in self._held) else lost_s + LOOK_S
            if lost_s > ALL_LOST_S:
                names = ", ".join(place.name for place in self._held)
                raise NoPlaceError(f"{names} could not be reached for {ALL_LOST_S:g} s; see logs/verifier-*.log")

    def _hand_out(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # it was cancelled
                self._waiting.popleft()
                continue
            place = self._freest()
            if place is None:
                return
            self._held[place] += 1
            self._waiting.popleft().set_result(place)

    def _freest(self) -> Place | None:
        open_ones = [p for p, held in self._held.items() if p.ready and held < p.workers * (1 + QUEUED_PER_WORKER)]
        return min(open_ones, key=lambda place: self._held[place] / place.workers, default=None)
