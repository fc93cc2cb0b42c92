"""What is not Python in the box: the compiler, the programs that it made, and commands.

They replace the interpreter in the process that has already given everything up; filter, limits and the process's
number stay. Programs may not start processes.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

COMPILER = "g++"
OPTIONS = ("-std=gnu++20", "-O2", "-w", "-pipe", "-fno-diagnostics-color", "-fmax-errors=3")
SOURCE, BINARY = "main.cpp", "program"
COMMAND = f"{COMPILER} {' '.join(OPTIONS)} {SOURCE} -o {BINARY} && exec cat {BINARY}"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "TMPDIR": ".", "LC_ALL": "C"}

PROGRAM_ENVIRONMENT = {"LC_ALL": "C.UTF-8"}
NOT_STARTED = 127


def compile_source(source: str) -> NoReturn:
    """Compile in the current folder, which is writable and empty; the binary goes to standard output."""
    with open(SOURCE, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(source)
    _signals_as_at_start()
    os.execve("/bin/sh", ["sh", "-c", COMMAND], ENVIRONMENT)


def run_command(argv: list[str]) -> NoReturn:
    """Become a command that may do all that its box allows."""
    _signals_as_at_start()
    try:
        os.execvpe(argv[0], argv, {**ENVIRONMENT, "HOME": "/tmp", "TMPDIR": "/tmp", "LC_ALL": "C.UTF-8"})
    except (OSError, ValueError) as error:  # too long, or not the text of any command
        os.write(2, f"{argv[0]}: {error}".encode())
        os._exit(NOT_STARTED)


def run_binary(file: int) -> NoReturn:
    """Become the program that the open file holds."""
    os.set_inheritable(file, False)
    _signals_as_at_start()
    try:
        os.execve(file, ["main"], PROGRAM_ENVIRONMENT)
    except OSError as error:  # more memory in the binary than the limit allows
        os.write(2, str(error).encode())
        os._exit(NOT_STARTED)


def _signals_as_at_start() -> None:
    """What is ignored stays so in the next program, and the interpreter and a verifier's worker ignore some."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
