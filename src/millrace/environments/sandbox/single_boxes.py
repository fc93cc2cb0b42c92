"""Boxes that start an interpreter for each run, from the supervisor's side; `single` is the other one."""

from __future__ import annotations

import io
import json
import marshal
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import Any

from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.boxes import ENVIRONMENT, Unavailable, interpreter_command
from millrace.environments.sandbox.collect import collect
from millrace.environments.sandbox.confine import NOBODY, leaves_root, memory_file
from millrace.environments.sandbox.namespaces import (
    DEVICES,
    SCRATCH,
    SYSTEM_FILES,
    SYSTEM_FOLDERS,
    interpreter_folder,
)
from millrace.environments.sandbox.run import COMPILER_BYTES, Command, Limits, Run, SandboxFault, Work
from millrace.environments.sandbox.syscall_filter import filter_problem
from millrace.environments.sandbox.wire import work_to_wire
from millrace.environments.sandbox.work import compiles

PACKAGE = Path(__file__).parent

LEAST_LANDLOCK = 3
"""Before it a file could be truncated by who may not write to it."""

OTHERS_SLACK = 512
"""Processes that a user may start elsewhere while a program runs, where the kernel counts them all together."""


class _SingleBox:
    """Starts an interpreter for each run."""

    name = ""
    scratch = False
    how = ""
    drop = False
    """Whether root becomes an ordinary user before it starts anything."""
    takes_commands = False
    """Whether what a command starts ends with its box, and sees no process outside."""

    def __init__(self) -> None:
        self.interpreter, self._code = _readable_interpreter(), _bundle()

    def run(self, work: Work, stdin: bytes, limits: Limits) -> Run:
        if isinstance(work, Command) and not self.takes_commands:
            raise SandboxFault(f"the tier {self.name} runs no commands")
        if limits.scratch_bytes:
            raise SandboxFault(f"the tier {self.name} has no scratch folder; only the zygote has")
        header, contents = work_to_wire(work)
        job = {"work": header, "limits": limits._asdict(), "processes": self._processes(limits)}
        with self._folder(compiles(header)) as scratch:
            return self._run(job, [stdin, json.dumps(job).encode(), self._code, *contents], scratch, limits)

    def _run(self, job: dict[str, Any], contents: list[bytes], scratch: int | None, limits: Limits) -> Run:
        """`contents` are those of standard input, of the job, of this package's code, and of the work's files."""
        (out, out_in), (err, err_in), (started, started_in) = os.pipe(), os.pipe(), os.pipe()
        files = [memory_file(content) for content in contents]
        given, job_file, code, *others = files
        words = [job_file, started_in, "-" if scratch is None else scratch, *others]
        command = self._command(code, [self.how, *map(str, words)], compiling=compiles(job["work"]))
        passed = [job_file, started_in, code, *others, *([] if scratch is None else [scratch])]
        try:
            process = _popen(command, given, out_in, err_in, passed, drop=self.drop and leaves_root())
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

    @contextmanager
    def _folder(self, needed: bool) -> Iterator[int | None]:
        """Descriptor of an empty folder that only the user whom programs run as can write to."""
        if not needed:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="millrace-compile-") as folder:
            if leaves_root():
                os.chown(folder, NOBODY, NOBODY)
            descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    def _command(self, code: int, arguments: list[str], *, compiling: bool) -> list[str]:
        """What is started: `single` with these arguments, with its code in the descriptor `code`."""
        return [*interpreter_command(self.interpreter, f"/proc/self/fd/{code}", "single"), *arguments]


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
    drop = True

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

    @contextmanager
    def _folder(self, needed: bool) -> Iterator[int | None]:
        """Each box brings its own."""
        yield None

    def _command(self, code: int, arguments: list[str], *, compiling: bool) -> list[str]:
        inner = [*interpreter_command(self.interpreter, "/box/code.zip", "single"), *arguments]
        return [self._bwrap, *_bubblewrap_options(code, tmp_bytes=COMPILER_BYTES if compiling else 0), "--", *inner]


class OpenBox(_SingleBox):
    """No isolation: a process with limits. For programs whose author is trusted."""

    name, how = "unsafe", "none"

    def _processes(self, limits: Limits) -> int:
        return limits.processes + OTHERS_SLACK + _tasks_of(os.geteuid())


def _popen(
    arguments: list[str], stdin: int, stdout: int, stderr: int, passed: Sequence[int], *, drop: bool
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


def _bubblewrap_options(code: int, *, tmp_bytes: int = 0, bound: Sequence[str] = (), start: str = "/") -> list[str]:
    """`tmp_bytes` may be written to /tmp. `bound` is how a folder of the host is bound (--bind or --ro-bind), its path
    and where it is seen; `start` is where programs start."""
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
    options += ["--size", str(tmp_bytes), "--tmpfs", SCRATCH] if tmp_bytes else ["--dir", SCRATCH]
    options += bound
    options += ["--dir", "/box", "--perms", "0444", "--ro-bind-data", str(code), "/box/code.zip"]
    return [*options, "--remount-ro", "/", "--chdir", start]


@cache
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
