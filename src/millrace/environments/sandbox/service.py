"""Verification of programs: worker processes with a box each, a bounded queue before them, and a count of everything.

A verdict is about the program alone. When a box fails, its run is tried again; when a worker dies or hangs, its program
goes to another one; and when a program can be given no verdict at all, SandboxError says so, because any score would be
made up.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from millrace.environments.sandbox.cpp import require_compiler
from millrace.environments.sandbox.run import CppProgram, Limits, Program
from millrace.environments.sandbox.tiers import UNSAFE, choose_tier
from millrace.environments.verifier_pool import VerifierPool
from millrace.errors import MillraceError

CHECK = "millrace.environments.sandbox.check:check"

TRIES = 3
"""Workers that a program is given to before there is no verdict."""

COMPILER_TRIES = 2 * 3
"""Of one program in a worker: twice where the compiler's message does not say why it failed, with three boxes."""

WORKER_BYTES = 8 << 30
"""Address space of a worker; a box's programs are its children and can have no more."""

QUEUED_PER_WORKER = 2
"""Programs handed to the pool beyond what runs; the others wait outside, where they cost nothing."""

START_S, SLACK_PER_TEST_S = 300.0, 60.0
"""How much longer than the limits of its tests a worker may take before it counts as stuck."""


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
    tests: int = 0
    passed: int = 0
    """Programs that passed all tests."""
    faults: int = 0
    """Runs whose box failed, and which were tried again."""
    lost_workers: int = 0
    """Workers that died or hung in the middle of a program, which then went to another one."""
    cpu_s: float = 0.0
    """Processor time of the programs."""
    busy_s: float = 0.0
    """Time that workers spent on programs, added up."""
    began: float = field(default_factory=time.monotonic)


class CodeVerifier:
    """`workers` processes (as many as there are processors when None) that test programs in boxes of one tier.

    Programs in C++ are taken when `compiler` limits how they are compiled. Python programs that are trusted not to keep
    anything from one test to the next may pass several tests in one process (`tests_per_process`).

    Raises:
        NoSandboxError: no tier can be used on this machine, or C++ cannot be compiled in it.
    """

    def __init__(
        self,
        *,
        tier: str = "auto",
        workers: int | None = None,
        compiler: Limits | None = None,
        tests_per_process: int = 1,
    ) -> None:
        self.tier = choose_tier(tier)
        self._compiler, self._tests_per_process = compiler, tests_per_process
        if compiler is not None:
            require_compiler(self.tier)
        self.workers = workers or os.cpu_count() or 1
        self.statistics = Statistics()
        self.pool = VerifierPool(CHECK, workers=self.workers, limit_s=START_S, memory_bytes=WORKER_BYTES)
        self._room = asyncio.Semaphore(self.workers * (1 + QUEUED_PER_WORKER))

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
            "tier": self.tier,
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
        async with self._room:
            report, lost = await self._report(job, limit_s)
        self._count(report, lost, len(tests))
        retries = report["faults"] + lost
        return Outcome(report["passed"], report["ran"], len(tests), report["failure"], self.tier, retries)

    def summary(self) -> str:
        """What was done so far, in a sentence for the log."""
        s = self.statistics
        warning = ", WITHOUT ISOLATION" if self.tier == UNSAFE else ""
        return (
            f"sandbox tier {self.tier}{warning}: {s.programs} programs, {s.tests} tests, {s.passed} programs passed "
            f"all; {s.faults} faults of boxes and {s.lost_workers} lost workers tried again"
        )

    async def close(self) -> None:
        await self.pool.close()

    async def _report(self, job: dict[str, Any], limit_s: float) -> tuple[dict[str, Any], int]:
        """A worker's report with a verdict, and how many workers were lost on the way."""
        reasons, lost = [], 0
        for _ in range(TRIES):
            verdict = await self.pool.verify(job, limit_s=limit_s)
            if verdict.outcome != "done":
                lost += 1
                self.statistics.lost_workers += 1
                reasons.append(verdict.reason)
            elif not verdict.result["decided"]:
                self.statistics.faults += verdict.result["faults"]
                reasons.append(verdict.result["fault"])
            else:
                return verdict.result, lost
        raise SandboxError(
            f"a program could not be tested in the sandbox (tier {self.tier}), {TRIES} times: {'; '.join(reasons)}. "
            "See that this machine has memory and processes left"
        )

    def _count(self, report: dict[str, Any], lost: int, tests: int) -> None:
        s = self.statistics
        s.programs += 1
        s.tests += report["ran"]
        s.passed += report["passed"] == tests
        s.faults += report["faults"]
        s.cpu_s += report["cpu_s"]
        s.busy_s += report["wall_s"]
