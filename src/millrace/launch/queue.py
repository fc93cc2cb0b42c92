"""What Slurm says of a job: asked of squeue, then of sacct, then of scontrol, whichever still knows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from millrace.errors import MillraceError

LIMIT_SECONDS = 60.0
UNKNOWN = "UNKNOWN"
ALIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"})


class SlurmError(MillraceError):
    """Slurm refused something, or is not there."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    id: str
    state: str
    """RUNNING, PENDING, COMPLETED, ...; UNKNOWN when nobody knows the job any more."""
    nodes: str = ""
    reason: str = ""
    """Why it waits."""
    exit_code: str = ""
    note: str = ""
    """What could not be asked."""

    @property
    def alive(self) -> bool:
        """Whether it runs or will."""
        return self.state in ALIVE


def slurm(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm. Raises SlurmError where there is none."""
    if shutil.which(command) is None:
        raise SlurmError(f"{command} is not on PATH: Slurm is not installed here, or its module is not loaded")
    return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=LIMIT_SECONDS)


def states(ids: Sequence[str]) -> list[JobState]:
    """The state of each job."""
    return [_state(job) for job in ids]


def _state(job: str) -> JobState:
    asked = slurm("squeue", "--noheader", "--jobs", job, "--format", "%T|%N|%r")
    if asked.returncode == 0 and asked.stdout.strip():
        state, nodes, reason = asked.stdout.strip().splitlines()[0].split("|")
        return JobState(id=job, state=state, nodes=nodes, reason="" if reason == "None" else reason)
    recorded, note = _of_accounting(job)
    return recorded or _of_controller(job, note)


def _of_accounting(job: str) -> tuple[JobState | None, str]:
    """What accounting says, or why it says nothing."""
    if shutil.which("sacct") is None:
        return None, "sacct is not installed"
    fields = "JobID,State,NodeList,ExitCode"
    asked = slurm("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job, "--format", fields)
    if asked.returncode != 0:
        return None, f"sacct says: {asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else 'nothing'}"
    for line in asked.stdout.splitlines():
        number, state, nodes, code = line.split("|")
        if number == job:
            return JobState(id=job, state=state.split()[0], nodes=nodes, exit_code=code), ""
    return None, "sacct does not know the job"


def _of_controller(job: str, note: str) -> JobState:
    asked = slurm("scontrol", "--oneliner", "show", "job", job)
    facts = dict(re.findall(r"(\w+)=(\S+)", asked.stdout))
    if asked.returncode != 0 or "JobState" not in facts:
        return JobState(id=job, state=UNKNOWN, note=note)
    return JobState(
        id=job,
        state=facts["JobState"],
        nodes=facts.get("NodeList", "").replace("(null)", ""),
        exit_code=facts.get("ExitCode", ""),
        note=note,
    )
