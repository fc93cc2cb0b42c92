"""Verification of programs: worker processes with a box each, a bounded queue before them, and a count of everything.

The workers are on this machine, and in a job with nodes that verify on those (`places`). A verdict is about the program
alone. When a box fails, its run is tried again; when a worker or its node dies or hangs, its program goes to another
one; and when a program can be given no verdict at all, SandboxError says so, because any score would be made up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from millrace.environments.sandbox.places import START_S, LocalPlace, NoPlaceError, Place, Queue
from millrace.environments.sandbox.remote import VerifierServer, remote_places
from millrace.environments.sandbox.run import CppProgram, Limits, Program
from millrace.environments.sandbox.tiers import UNSAFE
from millrace.errors import MillraceError

TRIES = 3
"""Workers that a program is given to before there is no verdict."""

COMPILER_TRIES = 2 * 3
"""Of one program in a worker: twice where the compiler's message does not say why it failed, with three boxes."""

SLACK_PER_TEST_S = 60.0
"""How much longer than a test's limit a worker may take before it counts as stuck."""


class SandboxError(MillraceError):
    """A program that no worker could give a verdict on."""


@dataclass(frozen=True)
class Case:
    input: str
    """Standard input; for a function its arguments, a list in JSON."""
    expected: Any
    """Standard output as text; for a function the value."""


@dataclass(frozen=True)
class Outcome:
    passed: int
    ran: int
    tests: int
    failure: str | None
    """The first failed test and why; None when all passed."""
    tier: str
    retries: int
    """Runs and workers that were tried again."""


@dataclass
class Statistics:
    """What the service did so far."""

    programs: int = 0
    programs_of: dict[str, int] = field(default_factory=dict)
    """Those of each place, by its name."""
    tests: int = 0
    passed: int = 0
    """Programs that passed all tests."""
    faults: int = 0
    """Runs whose box failed, or whose program was killed by none of its limits, and which were tried again."""
    lost_workers: int = 0
    """Workers that died or hung in the middle of a program, which then went to another one."""
    cpu_s: float = 0.0
    """Processor time of the programs."""
    busy_s: float = 0.0
    """Time that workers spent on programs, added up."""
    began: float = field(default_factory=time.monotonic)


class CodeVerifier:
    """Tests programs in boxes of a tier: in `workers` processes of this machine and in those of `servers`.

    When `workers` is None there are as many as processors, and with servers none. The tier of a server is what its
    machine makes of `tier`.

    Programs in C++ are taken when `compiler` limits how they are compiled. Python programs that are trusted not to keep
    anything from one test to the next may pass several tests in one process (`tests_per_process`).

    Raises:
        NoSandboxError: no tier can be used on this machine, or C++ cannot be compiled in it; or a server says so of
            its own, or does not come.
    """

    def __init__(
        self,
        *,
        tier: str = "auto",
        workers: int | None = None,
        compiler: Limits | None = None,
        tests_per_process: int = 1,
        servers: Sequence[VerifierServer] = (),
    ) -> None:
        self._compiler, self._tests_per_process = compiler, tests_per_process
        compiles = compiler is not None
        self.places: list[Place] = []
        if workers or not servers:
            self.places.append(LocalPlace(tier, workers, compiles=compiles))
        self.places += remote_places(servers, tier, compiles=compiles)
        self.statistics = Statistics()
        self._queue = Queue(self.places)

    async def verify(
        self,
        program: Program | CppProgram,
        tests: Sequence[Case],
        limits: Limits,
        *,
        every: bool = False,
        tolerance: float | None = None,
    ) -> Outcome:
        """Test a program, to its first failure or (`every`) on all tests. Waits for room in the queue.

        Raises:
            SandboxError: no worker could give a verdict.
        """
        compiler = self._compiler if isinstance(program, CppProgram) else None
        job = {
            "program": (program if isinstance(program, Program) else Program(program.source))._asdict(),
            "compiler": None if compiler is None else compiler._asdict(),
            "tests_per_process": self._tests_per_process,
            "limits": limits._asdict(),
            "tests": [{"input": test.input, "expected": test.expected} for test in tests],
            "every": every,
            "tolerance": tolerance,
        }
        limit_s = START_S + len(tests) * (limits.wall_s + SLACK_PER_TEST_S)
        limit_s += COMPILER_TRIES * compiler.wall_s if compiler is not None else 0.0
        report, place, lost = await self._report(job, limit_s)
        self._count(report, place, len(tests))
        retries = report["faults"] + lost
        return Outcome(report["passed"], report["ran"], len(tests), report["failure"], place.tier, retries)

    def summary(self) -> str:
        """What was done so far, in a sentence for the log."""
        s = self.statistics
        return (
            f"sandbox {self._tiers()}: {s.programs} programs, {s.tests} tests, {s.passed} programs passed "
            f"all; {s.faults} faults of boxes and {s.lost_workers} lost workers tried again"
        )

    @property
    def tier(self) -> str:
        """Of the first place; others may have others."""
        return self.places[0].tier

    async def close(self) -> None:
        await asyncio.gather(*(place.close() for place in self.places))

    def _tiers(self) -> str:
        """The tier of this machine; with servers that of each place, and how many programs got their verdict there."""
        told = [f"tier {p.tier}{', WITHOUT ISOLATION' if p.tier == UNSAFE else ''}" for p in self.places]
        if [place.name for place in self.places] == [LocalPlace.name]:
            return told[0]
        programs = self.statistics.programs_of
        places = zip(self.places, told, strict=True)
        return "; ".join(f"on {p.name} {tier}, {programs.get(p.name, 0)} programs" for p, tier in places)

    async def _report(self, job: dict[str, Any], limit_s: float) -> tuple[dict[str, Any], Place, int]:
        """A worker's report with a verdict, where it is from, and how many workers were lost on the way."""
        reasons, lost = [], 0
        for _ in range(TRIES):
            try:
                place = await self._queue.take()
            except NoPlaceError as error:
                raise SandboxError(f"a program could not be tested: {error}") from None
            try:
                verdict = await place.verify(job, limit_s)
            finally:
                self._queue.give_back(place)
            if verdict.outcome != "done":
                lost += 1
                self.statistics.lost_workers += 1
                reasons.append(verdict.reason)
            elif not verdict.result["decided"]:
                self.statistics.faults += verdict.result["faults"]
                reasons.append(verdict.result["fault"])
            else:
                return verdict.result, place, lost
        machine = "this machine has" if self.places[0].name == LocalPlace.name else "the nodes that verify have"
        raise SandboxError(
            f"a program could not be tested in the sandbox (tier {self.tier}), {TRIES} times: {'; '.join(reasons)}. "
            f"See that {machine} memory and processes left"
        )

    def _count(self, report: dict[str, Any], place: Place, tests: int) -> None:
        s = self.statistics
        s.programs += 1
        s.programs_of[place.name] = s.programs_of.get(place.name, 0) + 1
        s.tests += report["ran"]
        s.passed += report["passed"] == tests
        s.faults += report["faults"]
        s.cpu_s += report["cpu_s"]
        s.busy_s += report["wall_s"]
