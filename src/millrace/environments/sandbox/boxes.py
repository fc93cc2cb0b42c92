"""The ways to run a program away from everything else, from the supervisor's side."""

from __future__ import annotations

import io
import json
import marshal
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import Protocol

from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.collect import collect
from millrace.environments.sandbox.confine import NOBODY, leaves_root, memory_file
from millrace.environments.sandbox.namespaces import (
    DEVICES,
    SCRATCH,
    SYSTEM_FILES,
    SYSTEM_FOLDERS,
    interpreter_folder,
)
from millrace.environments.sandbox.run import Limits, Program, Run, SandboxFault
from millrace.environments.sandbox.syscall_filter import filter_problem
from millrace.environments.sandbox.wire import receive, run_from_wire, send

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE.parents[2]
"""Folder that `millrace` lies in."""

INTERPRETER_OPTIONS = ("-P", "-s", "-S", "-B")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
"""All that a program finds in its environment. A fixed seed of hashes gives it the same verdict every time."""

START_LIMIT_S = 30.0
ANSWER_GRACE_S = 45.0
"""How much longer than a run's own limit a zygote may take, for the program's start too, before it counts as stuck."""
END_GRACE_S = 2.0

LEAST_LANDLOCK = 3
"""Before it a file could be truncated by who may not write to it."""

OTHERS_SLACK = 512
"""Processes that a user may start elsewhere while a program runs, where the kernel counts them all together."""


class Unavailable(Exception):
    """Why a way cannot be used on this machine."""


class Box(Protocol):
    name: str
    scratch: bool
    """Whether it can give a program a limited folder to write to."""

    def run(self, program: Program, stdin: bytes, limits: Limits) -> Run:
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

    def run(self, program: Program, stdin: bytes, limits: Limits) -> Run:
        if self._channel is None:
            try:
                self._start()
            except Unavailable as error:
                raise SandboxFault(str(error)) from error
        assert self._channel is not None
        try:
            self._channel.settimeout(limits.wall_s + ANSWER_GRACE_S)
            send(self._channel, {"program": program._asdict(), "limits": limits._asdict()}, stdin)
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
            [*_interpreter(sys._base_executable, str(SOURCES), "zygote"), str(theirs.fileno())],  # type: ignore[attr-defined]
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


class _SingleBox:
    """Starts an interpreter for each run."""

    name = ""
    scratch = False
    how = ""

    def __init__(self) -> None:
        self.interpreter, self._code = _readable_interpreter(), _bundle()

    def run(self, program: Program, stdin: bytes, limits: Limits) -> Run:
        if limits.scratch_bytes:
            raise SandboxFault(f"the tier {self.name} has no scratch folder; only the zygote has")
        job = {"program": program._asdict(), "limits": limits._asdict(), "processes": self._processes(limits)}
        (out, out_in), (err, err_in), (started, started_in) = os.pipe(), os.pipe(), os.pipe()
        files = [memory_file(content) for content in (stdin, json.dumps(job).encode(), self._code)]
        try:
            process = self._launch(files[0], out_in, err_in, (files[1], started_in, files[2]))
        except OSError as error:
            for descriptor in (out, err, started):
                os.close(descriptor)
            raise SandboxFault(f"{self.name}: {error}") from error
        finally:
            for descriptor in (*files, out_in, err_in, started_in):
                os.close(descriptor)
        run = None
        try:
            run = collect(process.pid, out, err, started, limits)
        finally:
            process.returncode = run.status if run else 1  # collect has reaped it
        return run

    def close(self) -> None:
        """There is nothing between runs."""

    def _processes(self, limits: Limits) -> int:
        return limits.processes

    def _launch(self, stdin: int, stdout: int, stderr: int, passed: tuple[int, int, int]) -> subprocess.Popen[bytes]:
        """`passed` are the descriptors of the job, of the pipe for the start, and of this package's code."""
        job, started, code = passed
        arguments = _interpreter(self.interpreter, f"/proc/self/fd/{code}", "single")
        return _popen([*arguments, self.how, str(job), str(started)], stdin, stdout, stderr, passed)


class LandlockBox(_SingleBox):
    """A process that gives up files by Landlock and calls by seccomp; without namespaces."""

    name = how = "landlock"

    def __init__(self) -> None:
        if problem := filter_problem():
            raise Unavailable(problem)
        version = kernel.landlock_version()
        if version < LEAST_LANDLOCK:
            raise Unavailable(
                f"it needs version {LEAST_LANDLOCK} of Landlock (Linux 6.2), and the kernel has {version}"
            )
        super().__init__()
        self._others = _tasks_of(NOBODY if leaves_root() else os.geteuid()) + OTHERS_SLACK

    def _processes(self, limits: Limits) -> int:
        return limits.processes + self._others


class BubblewrapBox(_SingleBox):
    """One bubblewrap for each run. As root it becomes an ordinary user first: root in there is root to host files."""

    name = how = "bubblewrap"

    def __init__(self) -> None:
        if problem := filter_problem():
            raise Unavailable(problem)
        found = shutil.which("bwrap")
        if found is None:
            raise Unavailable("bubblewrap (bwrap) is not installed")
        super().__init__()
        self._bwrap = found

    def _processes(self, limits: Limits) -> int:
        return limits.processes + 2  # bubblewrap's own two

    def _launch(self, stdin: int, stdout: int, stderr: int, passed: tuple[int, int, int]) -> subprocess.Popen[bytes]:
        job, started, code = passed
        inner = [*_interpreter(self.interpreter, "/box/code.zip", "single"), self.how, str(job), str(started)]
        arguments = [self._bwrap, *_bubblewrap_options(code), "--", *inner]
        return _popen(arguments, stdin, stdout, stderr, passed, drop=leaves_root())


class OpenBox(_SingleBox):
    """No isolation: a process with limits. For programs whose author is trusted."""

    name, how = "unsafe", "none"

    def _processes(self, limits: Limits) -> int:
        return limits.processes + OTHERS_SLACK + _tasks_of(os.geteuid())


def _popen(
    arguments: list[str], stdin: int, stdout: int, stderr: int, passed: tuple[int, ...], *, drop: bool = False
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=passed,
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
        user=NOBODY if drop else None,
        group=NOBODY if drop else None,
        extra_groups=[] if drop else None,
    )


def _interpreter(executable: str, path: str, module: str) -> list[str]:
    """Command that calls `main` of a module of this package, found on `path`."""
    call = f"import sys; sys.path.insert(0, {path!r}); from {__package__}.{module} import main; main()"
    return [executable, *INTERPRETER_OPTIONS, "-c", call]


def _readable_interpreter() -> str:
    """An interpreter of this version that the user whom programs run as can read."""
    own = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    if not leaves_root() or _open_to_all(own):
        return own
    other = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    if _open_to_all(other):
        return other
    raise Unavailable(f"root runs programs as an ordinary user, who may read neither {own} nor {other}")


def _open_to_all(file: str) -> bool:
    if not os.path.exists(file):
        return False
    return all(os.stat(path).st_mode & 0o001 for path in (Path(file), *Path(file).parents))


def _bubblewrap_options(code: int) -> list[str]:
    options = ["--unshare-all", "--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"]
    options += ["--die-with-parent", "--new-session", "--hostname", "box"]
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    if (prefix := interpreter_folder()) != "/usr" and (_open_to_all(prefix) or not leaves_root()):
        options += ["--ro-bind", prefix, prefix]
    for file in SYSTEM_FILES:
        options += ["--ro-bind-try", file, file]
    for device in DEVICES:
        options += ["--dev-bind", device, device]
    options += ["--dir", SCRATCH, "--dir", "/box", "--perms", "0444", "--ro-bind-data", str(code), "/box/code.zip"]
    return [*options, "--remount-ro", "/", "--chdir", "/"]


def _bundle() -> bytes:
    """This package as a compiled archive: the user in the box may not be able to read where it lies."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        parts = __package__.split(".")
        for depth in range(1, len(parts) + 1):
            files.writestr("/".join((*parts[:depth], "__init__.py")), "")
        for source in sorted(PACKAGE.glob("*.py")):
            if source.name != "__init__.py":
                code = marshal.dumps(compile(source.read_bytes(), source.name, "exec"))
                header = MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)  # by hash, unchecked
                files.writestr("/".join((*parts, source.stem + ".pyc")), header + code)
    return archive.getvalue()


def _tasks_of(user: int) -> int:
    """Threads of a user on this machine."""
    count = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if folder.stat().st_uid == user:
                    count += len(os.listdir(folder / "task"))
    return count
