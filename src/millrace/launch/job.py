"""What a launched run keeps in RUN_DIR/launch, beside the placement of its nodes and the folders where they meet.

cluster.json   `Site`: what every node must know of the cluster
job.json       `JobRecord`: the jobs that were submitted for the run
current.json   which start of a job has the run now, and how many before it got nowhere
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import MillraceError
from millrace.rollout.rendezvous import LAUNCH_FOLDER, read_json, write_json

CLUSTER, JOB, CURRENT = "cluster.json", "job.json", "current.json"
MOST_STARTS = 3
"""Starts of one job in a row that may get nowhere."""


class StuckError(MillraceError):
    """A job is started again and again without getting further."""


@dataclass(frozen=True, kw_only=True)
class Site:
    cluster: str
    interface: str | None
    environment: Mapping[str, str]
    """Environment variables of every rank and server."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    ids: tuple[str, ...]
    """Slurm's numbers; several where each stage is a job."""
    log: str
    """Log of the job, with %j for its number."""
    submitted: float = dataclasses.field(default_factory=time.time)


def write_site(launch: Path, site: Site) -> None:
    write_json(launch / CLUSTER, dataclasses.asdict(site))


def read_site(launch: Path) -> Site:
    return Site(**read_json(launch / CLUSTER))


def write_job(launch: Path, job: JobRecord) -> None:
    write_json(launch / JOB, dataclasses.asdict(job))


def read_job(launch: Path) -> JobRecord | None:
    """The jobs that were last submitted; None for a run that was not launched."""
    facts = read_json(launch / JOB)
    return JobRecord(**{**facts, "ids": tuple(facts["ids"])}) if facts else None


def note_start(run_dir: Path, job: str) -> None:
    """Record that the start `job` (ID.RESTART) of a job has the run now, whichever launcher has submitted it.

    Raises StuckError when starts of one job follow each other in which the run gets no further, so that a job whose
    time is too short for one step is not put into the queue for ever.
    """
    launch, number = run_dir / LAUNCH_FOLDER, job.split(".")[0]
    known = read_job(launch)
    if known is None or number not in known.ids:
        write_job(launch, JobRecord(ids=(number,), log=str(run_dir / "logs" / "job-%j.log")))
    before, reached = read_json(launch / CURRENT), _reached(run_dir)
    same = before.get("job", "").split(".")[0] == number and before.get("reached") == reached
    starts = before.get("starts", 0) + 1 if same else 1
    write_json(launch / CURRENT, {"job": job, "reached": reached, "starts": starts})
    if starts > MOST_STARTS:
        raise StuckError(
            f"{MOST_STARTS} starts of job {number} were ended before the run got any further; give a job more time by "
            "slurm.time_limit or a later warning by slurm.warn_s in the cluster file, or save more often by "
            "checkpoint.every"
        )


def _reached(run_dir: Path) -> list[int]:
    """Something that grows with every step: bytes of the metrics, recorded batches of rollouts."""
    metrics = run_dir / "metrics.jsonl"
    written = metrics.stat().st_size if metrics.exists() else 0
    return [written, sum(1 for _ in run_dir.glob("rollouts/*/*.jsonl"))]
