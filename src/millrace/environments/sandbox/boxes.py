"""A box is a way to run a program away from everything else; this is the supervisor's side, and the zygote's. The boxes
that start an interpreter for each run are in `single_boxes`."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from millrace.environments.sandbox.run import Command, Limits, Run, SandboxFault, Work
from millrace.environments.sandbox.syscall_filter import filter_problem
from millrace.environments.sandbox.wire import receive, run_from_wire, send, work_to_wire

SOURCES = Path(__file__).parents[3]
"""Folder that `millrace` lies in."""

INTERPRETER_OPTIONS = ("-P", "-s", "-S", "-B")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
"""All that a program finds in its environment. A fixed seed of hashes gives it the same verdict every time."""

START_LIMIT_S = 30.0
ANSWER_GRACE_S = 45.0
"""How much longer than a run's own limit a zygote may take, for the program's start too, before it counts as stuck."""
END_GRACE_S = 2.0


class Unavailable(Exception):
    """Why a way cannot be used on this machine."""


class Box(Protocol):
    name: str
    scratch: bool
    """Whether it can give a program a limited folder to write to."""

    def run(self, work: Work, stdin: bytes, limits: Limits) -> Run:
        """Raises SandboxFault when the box failed; the next run starts afresh."""
        ...

    def close(self) -> None: ...


class ZygoteBox:
    """A zygote in namespaces; see `zygote`."""

    name = "zygote"
    scratch = True

    def __init__(self) -> None:
        if problem := filter_problem():
            raise Unavailable(problem)
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._start()

    def run(self, work: Work, stdin: bytes, limits: Limits) -> Run:
        if isinstance(work, Command):
            raise SandboxFault("the tier zygote runs no commands")
        if self._channel is None:
            try:
                self._start()
            except Unavailable as error:
                raise SandboxFault(str(error)) from error
        assert self._channel is not None
        try:
            self._channel.settimeout(limits.wall_s + ANSWER_GRACE_S)
            header, files = work_to_wire(work)
            contents = [stdin, *files]
            job = {"work": header, "limits": limits._asdict(), "sizes": [len(content) for content in contents]}
            send(self._channel, job, b"".join(contents))
            answer = receive(self._channel)
        except OSError as error:
            self.close(at_once=True)
            raise SandboxFault(f"the zygote does not answer: {error}") from error
        if answer is None:
            self.close(at_once=True)
            raise SandboxFault("the zygote ended in the middle of a run")
        header, output = answer
        if "fault" in header:
            self.close(at_once=True)
            raise SandboxFault(header["fault"])
        return run_from_wire(header, output)

    def close(self, *, at_once: bool = False) -> None:
        """Have the zygote end by itself, or kill it and with it all that it runs."""
        if self._channel is not None:
            self._channel.close()
        process, self.process, self._channel = self.process, None, None
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.0 if at_once else END_GRACE_S)
        process.kill()
        process.wait()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [*interpreter_command(sys._base_executable, str(SOURCES), "zygote"), str(theirs.fileno())],  # type: ignore[attr-defined]
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        self._channel.settimeout(START_LIMIT_S)
        try:
            answer = receive(self._channel)
        except OSError as error:
            answer = ({"ready": False, "why": str(error)}, b"")
        if answer is None or not answer[0].get("ready"):
            why = answer[0].get("why") if answer else f"it ended with status {self.process.wait(END_GRACE_S)}"
            self.close(at_once=True)
            raise Unavailable(f"a box of namespaces cannot be made ({why})")


def interpreter_command(executable: str, path: str, module: str) -> list[str]:
    """Command that calls `main` of a module of this package, found on `path`."""
    call = f"import sys; sys.path.insert(0, {path!r}); from {__package__}.{module} import main; main()"
    return [executable, *INTERPRETER_OPTIONS, "-c", call]
