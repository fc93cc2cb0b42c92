"""What is run in the box, under which limits, and what came of it. Imports the standard library alone, like all that
runs inside, and of it little: these are named tuples because dataclasses take longer to import than a program to
run."""

from __future__ import annotations

from typing import Literal, NamedTuple

Ending = Literal["exited", "killed", "wall", "cpu", "output"]

COMPILER_BYTES = 64 << 20
"""What a compiler may write in its folder, the binary included."""


class Limits(NamedTuple):
    """Limits of one run. What a program may write to is nothing but its output, unless `scratch_bytes` is set."""

    wall_s: float = 10.0
    """Seconds from the start to the kill."""
    cpu_s: int = 4
    """Seconds of processor time; a busy machine stretches the wall time alone."""
    memory_bytes: int = 1 << 30
    """Address space."""
    processes: int = 16
    """Threads; further processes are refused."""
    open_files: int = 64
    output_bytes: int = 1 << 20
    """Of standard output, and of standard error; more ends the run."""
    file_bytes: int = 16 << 20
    """Largest file."""
    scratch_bytes: int = 0
    """Size of an in-memory /tmp; at 0 no folder is writable. A compiler always has one of `COMPILER_BYTES`."""
    scratch_inodes: int = 2048
    """Files and folders in that /tmp."""
    stack_bytes: int = 64 << 20


class Program(NamedTuple):
    """A Python program, or a function of it that is called."""

    source: str
    function: str | None = None
    """Call this function (or this method of its class `Solution`) with the arguments that standard input holds as a
    list in JSON, and write what it returns as JSON; without it the source runs as a program of its own. For a
    function the source is imported, not run as `__main__`, and the names of typing are at hand: what a problem gives
    to start with has them in its annotations."""


class Batch(NamedTuple):
    """A Python program that is run on several inputs, one after the other, in one process."""

    program: Program
    inputs: tuple[bytes, ...]
    mark: str
    """Line that is written to standard output behind each of them that the program ended cleanly on."""


class CppProgram(NamedTuple):
    """A C++ program. To run it in a box is to compile it: what it gives on standard output is its `Binary`."""

    source: str


class Binary(NamedTuple):
    """A compiled program."""

    content: bytes


class Command(NamedTuple):
    """A command with all that it starts, for boxes that have a folder to work in."""

    argv: tuple[str, ...]


Work = Program | Batch | CppProgram | Binary | Command
"""What a box runs."""


class Run(NamedTuple):
    """How a run ended. Nothing in here says that an answer is right."""

    ending: Ending
    status: int
    """Exit status, or the number of the signal when it was killed."""
    stdout: bytes
    """Standard output; for a function what it returned, as JSON, and nothing else."""
    stderr: bytes
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0

    @property
    def clean(self) -> bool:
        """Whether the program came to its end by itself, with exit status 0."""
        return self.ending == "exited" and self.status == 0


class SandboxFault(Exception):
    """The box itself failed, before or beside the program: nothing is known of the program."""
