"""C++ programs in a verifier's worker: each is compiled once, in the box, before its tests."""

from __future__ import annotations

import re

from millrace.environments.sandbox.boxes import Box, Unavailable
from millrace.environments.sandbox.native import COMPILER
from millrace.environments.sandbox.run import Binary, CppProgram, Limits, Run, SandboxFault
from millrace.environments.sandbox.tiers import NoSandboxError, open_tier

BINARY_BYTES = 16 << 20
"""Largest binary."""
MAGIC = b"\x7fELF"

DIAGNOSIS = re.compile(
    r"^\S+:\d+:\d+: (?:fatal )?error: .*$|^\S.*:\d+: Error: .*$|undefined reference to .*$|multiple definition of .*$",
    re.MULTILINE,
)
"""What compiler, assembler and linker say of a program that is wrong; of their own troubles they speak otherwise."""

SHOWN = 120
"""Characters of the compiler's message that a reason quotes."""

MISSING = 127
"""Exit status of a shell that does not find a command."""

CANARY_LIMITS = Limits(wall_s=60.0, cpu_s=20, output_bytes=BINARY_BYTES, file_bytes=BINARY_BYTES)
CANARY = r"""
#include <fcntl.h>
#include <unistd.h>
#include <cstdio>
#include <vector>

int main() {
    std::vector<long> numbers(2);
    std::scanf("%ld %ld", &numbers[0], &numbers[1]);
    std::printf("%ld\n", numbers[0] + numbers[1]);
    if (open("/etc/passwd", O_RDONLY) >= 0) std::puts("reads /etc/passwd");
    std::fflush(stdout);
    pid_t child = fork();
    if (child == 0) _exit(0);
    if (child > 0) std::puts("starts a process");
}
"""


def compiler_limits(*, cpu_s: float, wall_s: float, memory_bytes: int) -> Limits:
    return Limits(wall_s, round(cpu_s + 0.5), memory_bytes, output_bytes=BINARY_BYTES, file_bytes=BINARY_BYTES)


def compile_program(box: Box, program: CppProgram, limits: Limits) -> Binary | str:
    """The binary, or why there is none, which is the program's failure.

    A compiler that ends without a word on a line of the program may have failed by itself: then one that is known to
    be right is compiled, and the program once more.

    Raises:
        SandboxFault: the compiler fails by itself.
    """
    run = box.run(program, b"", limits)
    if not _is_binary(run) and not DIAGNOSIS.search(_message(run)):
        if problem := compiler_problem(box):
            raise SandboxFault(problem)
        run = box.run(program, b"", limits)
    return Binary(run.stdout) if _is_binary(run) else f"does not compile ({_reason(run)})"


def compiler_problem(box: Box) -> str | None:
    """Why C++ programs cannot be compiled and run in a box, or None."""
    try:
        made = box.run(CppProgram(CANARY), b"", CANARY_LIMITS)
        if made.ending == "exited" and made.status == MISSING:
            return f"the sandbox has no {COMPILER}"
        if not _is_binary(made):
            return f"{COMPILER} does not work in the sandbox ({_reason(made)})"
        run = box.run(Binary(made.stdout), b"1 2\n", CANARY_LIMITS)
    except SandboxFault as error:
        return str(error)
    total, *escapes = run.stdout.decode(errors="replace").split("\n")[:-1] or [""]
    if not run.clean or total != "3":
        return f"a program that {COMPILER} made does not run in the sandbox ({_reason(run)})"
    return f"a C++ program in the box {', '.join(escapes)}" if escapes and box.name != "unsafe" else None


def require_compiler(tier: str) -> None:
    """Raises NoSandboxError: C++ cannot be compiled in boxes of this tier; and why."""
    problem: str | None
    try:
        box = open_tier(tier)
    except Unavailable as error:
        problem = str(error)
    else:
        problem = compiler_problem(box)
        box.close()
    if problem:
        raise NoSandboxError(
            f"C++ programs cannot be tested on this machine: {problem}; install g++ (10 or later) below /usr, or take "
            "cpp out of the domain's sandbox.languages"
        )


def _is_binary(run: Run) -> bool:
    return run.clean and run.stdout.startswith(MAGIC)


def _message(run: Run) -> str:
    return run.stderr.decode(errors="replace")


def _reason(run: Run) -> str:
    if run.ending == "wall":
        return "time limit"
    if run.ending == "output":
        return "the binary is too large"
    lines = _message(run).strip().splitlines()
    if found := DIAGNOSIS.search(_message(run)) or re.search("^.*error: .*$", _message(run), re.M):
        lines.append(found[0])
    return lines[-1][:SHOWN] if lines else f"{run.ending} with {run.status}"
