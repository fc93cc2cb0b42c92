"""Boxes with a folder to work in: commands that see one folder of the host, writable, and nothing else of it.

Every command is a box of its own, so that it ends with all that it started; what it leaves is in the folder. On a
laptop the box is bubblewrap's, with the machine's own programs below /usr; where Apptainer is, it is an image.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from millrace.environments.sandbox.boxes import Unavailable, interpreter_command
from millrace.environments.sandbox.confine import NOBODY, leaves_root
from millrace.environments.sandbox.run import Command, Ending, Limits, Run, SandboxFault
from millrace.environments.sandbox.single_boxes import BubblewrapBox, _bubblewrap_options

WORK = "/testbed"
"""Where commands see the folder."""
COPY = "/millrace-copy"
TMP_BYTES = 256 << 20
"""Size of a command's /tmp, which is gone after it."""

APPTAINER_FAULT = 255
"""Exit status of Apptainer when it could not start the container."""
KILLED = 128 + signal.SIGKILL


class LocalWorkspace:
    """One bubblewrap for each command, with the machine's own programs.

    Raises:
        Unavailable: bubblewrap does not work here, or git is not below /usr.
    """

    name = "bubblewrap"
    ends_for_memory = False
    """Memory is limited for each process, which is told so: what is killed was killed by something else."""

    def __init__(self) -> None:
        _FolderBox(Path("/"))
        if not os.path.exists("/usr/bin/git"):
            raise Unavailable("commands see what is below /usr, and there is no /usr/bin/git; install git")

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
        begin = time.monotonic()
        process = subprocess.Popen(
            self.command(folder, argv, limits, image),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        timer = threading.Timer(limits.wall_s, _end_group, [process.pid])
        timer.start()
        try:
            stdout, stderr = process.communicate(stdin)
        finally:
            timer.cancel()
        seconds = time.monotonic() - begin
        if process.returncode == APPTAINER_FAULT and b"FATAL" in stderr:
            raise SandboxFault(f"apptainer: {stderr.decode(errors='replace').strip()[-500:]}")
        out_of_time = seconds >= limits.wall_s and process.returncode < 0
        ending: Ending = "wall" if out_of_time else "killed" if process.returncode < 0 else "exited"
        output = (stdout[: limits.output_bytes], stderr[: limits.output_bytes])
        return Run(ending, abs(process.returncode), *output, wall_s=seconds)

    def own(self, folder: Path) -> None:
        """A container runs as the user who starts it."""

    def unpack(self, image: str, folder: Path) -> None:
        """Copy the repository that an image holds into a folder.

        Raises:
            SandboxFault: it has none, or cannot be read.
        """
        command = [self._apptainer, "exec", "--containall", "--bind", f"{folder}:{COPY}", image]
        done = subprocess.run([*command, "cp", "-a", f"{WORK}/.", COPY], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SandboxFault(f"apptainer: {WORK} of {image} cannot be copied: {done.stderr.strip()[-500:]}")


def out_of_memory(run: Run) -> bool:
    """Whether something killed what ran that was not one of its limits."""
    return (run.ending == "exited" and run.status == KILLED) or (
        run.ending == "killed" and run.status == signal.SIGKILL
    )


Workspace = LocalWorkspace | ApptainerWorkspace


def open_workspace(kind: Literal["bubblewrap", "apptainer"]) -> Workspace:
    """Raises Unavailable."""
    return ApptainerWorkspace() if kind == "apptainer" else LocalWorkspace()


def _end_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
