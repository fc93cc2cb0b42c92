"""Boxes with a folder to work in: commands that see one folder of the host, writable, and nothing else of it.

Every command is a box of its own, so that it ends with all that it started; what it leaves is in the folder. On a
laptop the box is bubblewrap's, with the machine's own programs below /usr; where Apptainer is, it is an image.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from millrace.environments.sandbox.boxes import Unavailable, interpreter_command
from millrace.environments.sandbox.collect import collect
from millrace.environments.sandbox.confine import NOBODY, leaves_root, memory_file
from millrace.environments.sandbox.native import NOT_STARTED
from millrace.environments.sandbox.run import Command, Limits, Run, SandboxFault
from millrace.environments.sandbox.single_boxes import BubblewrapBox, _bubblewrap_options
from millrace.environments.sandbox.tiers import open_tier

WORK = "/testbed"
"""Where commands see the folder."""
COPY = "/millrace-copy"
TMP_BYTES = 256 << 20
"""Size of a command's /tmp, which is gone after it."""

CANARY_LIMITS = Limits(processes=64)
UNPACK_LIMITS = Limits(wall_s=1800.0, cpu_s=1800)
"""Of copying a repository out of an image, which may have to be fetched first."""
APPTAINER_FAULT = 255
"""Exit status of Apptainer when it could not start the container."""
KILLED = 128 + signal.SIGKILL


class LocalWorkspace:
    """One bubblewrap for each command, with the machine's own programs.

    Raises:
        Unavailable: bubblewrap does not work here, or git does not in it.
    """

    name = "bubblewrap"
    ends_for_memory = False
    """Memory is limited for each process, which is told so: what is killed was killed by something else."""

    def __init__(self) -> None:
        if not os.path.exists("/usr/bin/git"):
            raise Unavailable("commands see what is below /usr, and there is no /usr/bin/git; install git")
        open_tier("bubblewrap").close()
        with tempfile.TemporaryDirectory(prefix="millrace-canary-") as folder:
            self.own(Path(folder))
            try:
                run = self.run(Path(folder), ["git", "init", "--quiet"], CANARY_LIMITS)
            except SandboxFault as fault:
                raise Unavailable(f"a folder in {tempfile.gettempdir()} cannot be shown in a box ({fault})") from fault
        if not run.clean:
            raise Unavailable(f"git does not work in a box ({run.stderr.decode(errors='replace').strip()[-300:]})")

    def run(self, folder: Path, argv: Sequence[str], limits: Limits, *, stdin: bytes = b"", image: str = "") -> Run:
        """Run a command in a folder, which it may change. Raises SandboxFault: the box could not be made."""
        folder.chmod(0o755)  # an earlier command may have closed it
        return _FolderBox(folder).run(Command(tuple(argv)), stdin, limits)

    def own(self, folder: Path) -> None:
        """Give a folder to the user whom commands run as."""
        if leaves_root():
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


class _FolderBox(BubblewrapBox):
    """One bubblewrap for each run, with a folder."""

    takes_commands = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._bound = folder

    def _command(self, code: int, arguments: list[str], *, compiling: bool) -> list[str]:
        inner = [*interpreter_command(self.interpreter, "/box/code.zip", "single"), *arguments]
        options = _bubblewrap_options(code, tmp_bytes=TMP_BYTES, bound=("--bind", str(self._bound), WORK), start=WORK)
        return [self._bwrap, *options, "--", *inner]


class ApptainerWorkspace:
    """One container for each command, from the row's image, without network and without anything of the host.

    Raises:
        Unavailable: Apptainer is not installed.
    """

    name = "apptainer"
    ends_for_memory = True
    """Memory is limited for the container, whose processes the kernel kills at the limit."""

    def __init__(self) -> None:
        found = shutil.which("apptainer")
        if found is None:
            raise Unavailable("apptainer is not installed")
        self._apptainer = found

    def command(self, folder: Path, argv: Sequence[str], limits: Limits, image: str) -> list[str]:
        options = ["exec", "--containall", "--no-home", "--writable-tmpfs", "--net", "--network", "none"]
        options += ["--memory", str(limits.memory_bytes), "--pids-limit", str(limits.processes)]
        return [self._apptainer, *options, "--bind", f"{folder}:{WORK}", "--pwd", WORK, image, *argv]

    def run(self, folder: Path, argv: Sequence[str], limits: Limits, *, stdin: bytes = b"", image: str = "") -> Run:
        """Run a command in a folder, in a container of the image. Raises SandboxFault: it could not be made."""
        folder.chmod(0o755)  # an earlier command may have closed it
        command = self.command(folder, argv, limits, image)
        run = _ended(command, stdin, limits)
        if not _may_be_a_fault(run):
            return run
        if _may_be_a_fault(_ended(self.command(folder, ["true"], limits, image), b"", limits)):
            raise _fault(run)
        return _ended(command, stdin, limits)

    def own(self, folder: Path) -> None:
        """A container runs as the user who starts it."""

    def unpack(self, image: str, folder: Path) -> None:
        """Copy the repository that an image holds into a folder.

        Raises:
            SandboxFault: it has none, or cannot be read.
        """
        command = [self._apptainer, "exec", "--containall", "--bind", f"{folder}:{COPY}", image]
        run = _ended([*command, "cp", "-a", f"{WORK}/.", COPY], b"", UNPACK_LIMITS)
        if not run.clean:
            raise SandboxFault(f"{WORK} of {image} cannot be copied: {_fault(run)}")


def out_of_memory(run: Run) -> bool:
    """Whether something killed what ran that was not one of its limits."""
    return (run.ending == "exited" and run.status == KILLED) or (
        run.ending == "killed" and run.status == signal.SIGKILL
    )


Workspace = LocalWorkspace | ApptainerWorkspace


def open_workspace(kind: Literal["bubblewrap", "apptainer"]) -> Workspace:
    """Raises Unavailable."""
    return ApptainerWorkspace() if kind == "apptainer" else LocalWorkspace()


def _ended(command: list[str], stdin: bytes, limits: Limits) -> Run:
    """A process of this machine with all that it started, to its end or to its limits of time and of output."""
    given, (out, out_in), (err, err_in) = memory_file(stdin), os.pipe(), os.pipe()
    try:
        process = subprocess.Popen(command, stdin=given, stdout=out_in, stderr=err_in, start_new_session=True)
    except (OSError, ValueError) as error:
        os.close(out)
        os.close(err)
        if isinstance(error, OSError) and error.errno != errno.E2BIG:
            raise SandboxFault(f"{command[0]}: {error}") from error
        return Run("exited", NOT_STARTED, b"", str(error).encode())  # too long, or not the text of any command
    finally:
        for descriptor in (given, out_in, err_in):
            os.close(descriptor)
    run = None
    try:
        run = collect(process.pid, out, err, None, limits)
    finally:
        process.returncode = run.status if run else 1  # collect has reaped it
    return run


def _may_be_a_fault(run: Run) -> bool:
    """Whether a run ended as one does where no container could be made; a command in it may end like that too."""
    return run.ending == "exited" and run.status == APPTAINER_FAULT and b"FATAL" in run.stderr


def _fault(run: Run) -> SandboxFault:
    said = run.stderr.decode(errors="replace").strip()[-500:]
    return SandboxFault(f"apptainer: {said or f'{run.ending} with {run.status}'}")
