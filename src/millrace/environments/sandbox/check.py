"""Tests of one program, in a verifier's worker process; see `service`.

The worker holds the box and the expected values; the box gets the source and a test's input, and gives back what the
program wrote. Every test is a process of its own, unless the recipe trusts programs with several of them: then a
process goes through as many as it passes, and what it does not pass is tested again by itself.
"""

from __future__ import annotations

import json
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from millrace.environments.sandbox.boxes import Box, Unavailable
from millrace.environments.sandbox.compare import NotOneValueError, read_value, same_text, same_value
from millrace.environments.sandbox.cpp import compile_program
from millrace.environments.sandbox.run import Batch, Binary, CppProgram, Limits, Program, Run, SandboxFault, Work
from millrace.environments.sandbox.tiers import open_tier

TRIES = 3
"""Of a run whose box fails, within one worker."""

SHOWN = 120
"""Characters of a program's message that a reason quotes."""
COMPARED = 60
"""Characters of a wrong output, and of the one that was expected, that a reason quotes."""

T = TypeVar("T")

_boxes: dict[str, Box] = {}


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run `job`'s program on its tests, to the first that fails or (`every`) all of them.

    Returns `passed` and `ran`; `failure`, the first failed test with its reason, or why the program does not compile;
    `decided`, whether these are a verdict; `faults`, how often a box failed; and `fault` with the last one's message.
    """
    return _Checking(job).report()


class _NoVerdictError(Exception):
    """The box failed each time; its message is in the report."""


class _Checking:
    """One job on its way through."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job, self._limits = job, Limits(**job["limits"])
        self._work: Work = Program(**job["program"])
        self._tests: Sequence[Mapping[str, Any]] = job["tests"]
        self._at_once = job["tests_per_process"]
        self._report: dict[str, Any] = {"passed": 0, "ran": 0, "failure": None, "faults": 0, "fault": None}
        self._cpu_s = 0.0

    def report(self) -> dict[str, Any]:
        begin, decided = time.monotonic(), True
        try:
            if self._job["compiler"] is None or self._compile():
                self._run_tests()
        except _NoVerdictError:
            decided = False
        return {**self._report, "decided": decided, "cpu_s": self._cpu_s, "wall_s": time.monotonic() - begin}

    def _compile(self) -> bool:
        program, limits = CppProgram(self._job["program"]["source"]), Limits(**self._job["compiler"])
        made = self._tried(lambda box: compile_program(box, program, limits))
        if isinstance(made, Binary):
            self._work, self._at_once = made, 1
            return True
        self._report["failure"] = made
        return False

    def _run_tests(self) -> None:
        place = 0
        while place < len(self._tests):
            if place and self._at_once > 1:  # most programs that are wrong are so on the first test
                together = self._tests[place : place + self._at_once]
                passed = self._passed_together(together)
                self._report["ran"] += passed
                self._report["passed"] += passed
                place += passed
                if passed == len(together):
                    continue
            problem = self._problem_of(self._tests[place])
            self._report["ran"] += 1
            self._report["passed"] += problem is None
            place += 1
            if problem is not None:
                self._report["failure"] = self._report["failure"] or f"test {place}: {problem}"
                if not self._job["every"]:
                    return

    def _problem_of(self, test: Mapping[str, Any]) -> str | None:
        run = self._run(self._work, test["input"].encode())
        return _ending(run) or self._difference(run.stdout, test["expected"])

    def _passed_together(self, tests: Sequence[Mapping[str, Any]]) -> int:
        """How many of these one process passes under the limits of one, up to the first that it does not."""
        assert isinstance(self._work, Program)
        mark = secrets.token_hex(16)
        run = self._run(Batch(self._work, tuple(test["input"].encode() for test in tests), mark), b"")
        if run.ending in ("wall", "cpu"):
            self._at_once = 1  # each of them may be close to its limit
        outputs = run.stdout.split(f"{mark}\n".encode())[:-1]
        passed = 0
        for output, test in zip(outputs, tests, strict=False):
            if self._difference(output, test["expected"]) is not None:
                break
            passed += 1
        return passed

    def _difference(self, output: bytes, expected: Any) -> str | None:
        """Why what a program gave, which came to a clean end, is not what was expected, or None."""
        tolerance = self._job["tolerance"]
        try:
            given = output.decode()
            if self._job["program"]["function"] is not None:
                right = same_value(read_value(given), expected, tolerance)
                return None if right else f"wrong value {_shown(given)}, not {_shown(json.dumps(expected))}"
            right = same_text(given, expected, tolerance)
            return (
                None if right else f"wrong output {_shown(repr(given.rstrip()))}, not {_shown(repr(expected.rstrip()))}"
            )
        except NotOneValueError:
            return "no value"
        except UnicodeDecodeError:
            return "output is no text"

    def _run(self, work: Work, stdin: bytes) -> Run:
        run = self._tried(lambda box: box.run(work, stdin, self._limits))
        if _killed_from_outside(run, self._limits):
            self._fault("a program was killed by none of its limits; see that the machine has memory left")
            run = self._tried(lambda box: box.run(work, stdin, self._limits))  # one that has itself killed is so again
        self._cpu_s += run.cpu_s
        return run

    def _tried(self, action: Callable[[Box], T]) -> T:
        """What the action gives, which is tried again with a new box where the box fails."""
        tier = self._job["tier"]
        for _ in range(TRIES):
            try:
                if tier not in _boxes:
                    _boxes[tier] = open_tier(tier)
                return action(_boxes[tier])
            except (SandboxFault, Unavailable) as error:
                self._fault(str(error))
                if (box := _boxes.pop(tier, None)) is not None:
                    box.close()
        raise _NoVerdictError

    def _fault(self, message: str) -> None:
        self._report["faults"] += 1
        self._report["fault"] = message


def close_boxes() -> None:
    """End the boxes of this process. One that ends itself need not: its boxes end with it."""
    while _boxes:
        _boxes.popitem()[1].close()


def _shown(text: str) -> str:
    return text if len(text) <= COMPARED else f"{text[:COMPARED]}..."


def _killed_from_outside(run: Run, limits: Limits) -> bool:
    """Whether a program may have been killed as a machine without memory kills. In bubblewrap that is an exit status,
    which the limit of processor time gives too."""
    if run.ending == "killed":
        return run.status == signal.SIGKILL
    return run.ending == "exited" and run.status == 128 + signal.SIGKILL and run.wall_s < limits.cpu_s


def _ending(run: Run) -> str | None:
    """How a program ended that did not come to a clean end, and passes no test whatever it wrote; None for one that
    did, which has proved nothing by it."""
    if run.clean:
        return None
    match run.ending:
        case "wall":
            return "time limit"
        case "cpu":
            return "processor time limit"
        case "output":
            return "output limit"
        case "killed":
            return f"killed by signal {run.status}"
    lines = run.stderr.decode(errors="replace").strip().splitlines()
    return f"exit status {run.status}" + (f" ({lines[-1][:SHOWN]})" if lines else "")
