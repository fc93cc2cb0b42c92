"""Tests of one program, in a verifier's worker process; see `service`.

The worker holds the box and the expected values; the box gets the source and one test's input at a time, and gives back
what the program wrote. Every test is a process of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from millrace.environments.sandbox.boxes import Box, Unavailable
from millrace.environments.sandbox.compare import NotOneValueError, read_value, same_text, same_value
from millrace.environments.sandbox.run import Limits, Program, Run, SandboxFault
from millrace.environments.sandbox.tiers import open_tier

TRIES = 3
"""Of a run whose box fails, within one worker."""

SHOWN = 120
"""Characters of a program's message that a reason quotes."""
COMPARED = 60
"""Characters of a wrong output, and of the one that was expected, that a reason quotes."""

_boxes: dict[str, Box] = {}


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run `job`'s program on its tests, to the first that fails or (with `every`) all of them.

    Returns `passed` and `ran`; `failure`, the first failed test with its reason; `faults`, how often a box failed; and
    `fault` with the last one's message where there is no verdict.
    """
    program, limits = Program(**job["program"]), Limits(**job["limits"])
    report: dict[str, Any] = {"passed": 0, "ran": 0, "failure": None, "faults": 0, "fault": None, "cpu_s": 0.0}
    begin = time.monotonic()
    for place, test in enumerate(job["tests"]):
        run = _run(job["tier"], program, test["input"].encode(), limits, report)
        if run is None:
            break
        report["ran"] += 1
        report["cpu_s"] += run.cpu_s
        problem = _problem(run, test["expected"], program.function is not None, job["tolerance"])
        report["passed"] += problem is None
        if problem is not None:
            report["failure"] = report["failure"] or f"test {place + 1}: {problem}"
            if not job["every"]:
                break
    return {**report, "wall_s": time.monotonic() - begin}


def close_boxes() -> None:
    """End the boxes of this process. One that ends itself need not: its boxes end with it."""
    while _boxes:
        _boxes.popitem()[1].close()


def _run(tier: str, program: Program, stdin: bytes, limits: Limits, report: dict[str, Any]) -> Run | None:
    """How the program ended, or None when its box failed each time, which is then in the report."""
    for _ in range(TRIES):
        try:
            if tier not in _boxes:
                _boxes[tier] = open_tier(tier)
            return _boxes[tier].run(program, stdin, limits)
        except (SandboxFault, Unavailable) as error:
            report["faults"] += 1
            report["fault"] = str(error)
            if (box := _boxes.pop(tier, None)) is not None:
                box.close()
    return None


def _problem(run: Run, expected: Any, is_value: bool, tolerance: float | None) -> str | None:
    """Why a run does not pass its test, or None. A program that did not come to a clean end passes none, whatever it
    wrote; one that did has proved nothing by it."""
    if not run.clean:
        return _ending(run)
    try:
        given = run.stdout.decode()
        if is_value:
            right = same_value(read_value(given), expected, tolerance)
            return None if right else f"wrong value {_shown(given)}, not {_shown(json.dumps(expected))}"
        right = same_text(given, expected, tolerance)
        return None if right else f"wrong output {_shown(repr(given.rstrip()))}, not {_shown(repr(expected.rstrip()))}"
    except NotOneValueError:
        return "no value"
    except UnicodeDecodeError:
        return "output is no text"


def _shown(text: str) -> str:
    return text if len(text) <= COMPARED else f"{text[:COMPARED]}..."


def _ending(run: Run) -> str:
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
