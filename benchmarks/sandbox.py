"""What a sandboxed test costs: `python -m benchmarks.sandbox [--runs 100] [--programs 400] [--tests 5]`.

First one run at a time, the tiers and a bare interpreter taking turns: median and quartiles of the milliseconds from
the call to the result, for a program that adds two numbers (`--runs 0` leaves this out). Then whole programs through
the service, with one worker and with two: programs and tests a second, all passing, so that nothing stops early; and
the seconds of a core that a program took, next to those of the paper's verifier, whose programs and tests are others:
427 s for 2,048 programs on 384 cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import quantiles

from millrace.environments.sandbox.boxes import INTERPRETER_OPTIONS, Box, Unavailable
from millrace.environments.sandbox.cpp import compiler_limits
from millrace.environments.sandbox.run import CppProgram, Limits, Program
from millrace.environments.sandbox.service import Case, CodeVerifier
from millrace.environments.sandbox.tiers import TIERS, open_tier

ADD = "print(sum(map(int, input().split())))"
ADD_CPP = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << '\\n'; }"
LIMITS = Limits()
PAPER_CORE_S = 427 * 384 / 2048
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--programs", type=int, default=400)
    parser.add_argument("--tests", type=int, default=5)
    parser.add_argument("--tiers", nargs="+", choices=list(TIERS), default=list(TIERS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--language", choices=("python", "cpp"), default="python")
    parser.add_argument("--tests-per-process", type=int, default=1)
    arguments = parser.parse_args()
    boxes = _boxes(arguments.tiers)
    if arguments.runs:
        _race(boxes, arguments.runs)
    for box in boxes.values():
        box.close()
    for tier in boxes:
        for workers in arguments.workers:
            asyncio.run(_serve(tier, workers, arguments))


def _boxes(tiers: Sequence[str]) -> dict[str, Box]:
    boxes = {}
    for name in tiers:
        try:
            boxes[name] = open_tier(name)
        except Unavailable as error:
            _say(f"{name:12} not on this machine: {error}")
    return boxes


def _race(boxes: dict[str, Box], runs: int) -> None:
    """Take turns, so that a noisy machine disturbs all alike."""
    runners: dict[str, Callable[[], bytes]] = {"bare": _bare}
    for name, box in boxes.items():
        runners[name] = lambda box=box: box.run(Program(ADD), b"1 2\n", LIMITS).stdout  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(WARM_UP + runs):
        for name, runner in runners.items():
            begin = time.perf_counter()
            output = runner()
            if output != b"3\n":
                raise SystemExit(f"{name}: {output!r} is not the sum")
            if number >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - begin))
    bare = quantiles(times["bare"])[1]
    for name, values in times.items():
        low, middle, high = quantiles(values)
        _say(f"{name:12} {middle:6.1f} ms a test ({low:.1f} to {high:.1f}), {middle / bare:.2f} of a bare start")


def _bare() -> bytes:
    command = [sys._base_executable, *INTERPRETER_OPTIONS, "-c", ADD]  # type: ignore[attr-defined]
    return subprocess.run(command, input=b"1 2\n", capture_output=True, env={}, check=True).stdout


async def _serve(tier: str, workers: int, arguments: argparse.Namespace) -> None:
    programs, tests, at_once = arguments.programs, arguments.tests, arguments.tests_per_process
    compiler = compiler_limits(cpu_s=10, wall_s=60, memory_bytes=1 << 30) if arguments.language == "cpp" else None
    program = Program(ADD) if compiler is None else CppProgram(ADD_CPP)
    verifier = CodeVerifier(tier=tier, workers=workers, compiler=compiler, tests_per_process=at_once)
    cases = [Case(f"{n} 1\n", f"{n + 1}\n") for n in range(tests)]
    await asyncio.gather(*(verifier.verify(program, cases, LIMITS) for _ in range(2 * workers)))
    begin = time.perf_counter()
    outcomes = await asyncio.gather(*(verifier.verify(program, cases, LIMITS) for _ in range(programs)))
    seconds = time.perf_counter() - begin
    await verifier.close()
    if any(outcome.failure for outcome in outcomes):
        raise SystemExit(f"{tier}: {next(outcome.failure for outcome in outcomes if outcome.failure)}")
    rate, load = programs / seconds, os.getloadavg()[0]
    what = f"{programs} {arguments.language} programs of {tests} tests, {at_once} to a process"
    speed = f"{rate:.1f} programs and {rate * tests:.0f} tests a second; {workers / rate:.2f} s of a core to a program"
    paper = f"the paper's: {PAPER_CORE_S:.0f}"
    _say(f"{tier:12} {workers} workers: {what}, in {seconds:.1f} s: {speed} ({paper}); load {load:.1f}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
