"""What a launched run keeps in RUN_DIR/launch, beside the placement of its nodes and the folders where they meet.

cluster.json   `Site`: what every node must know of the cluster
job.json       `JobRecord`: the jobs that were submitted for the run
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millrace.rollout.rendezvous import LAUNCH_FOLDER, read_json, write_json

CLUSTER, JOB = "cluster.json", "job.json"


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


def note_job(run_dir: Path, job: str) -> None:
    """Record a job that another launcher than `millrace launch` has submitted, so that the run is found by it."""
    launch = run_dir / LAUNCH_FOLDER
    known = read_job(launch)
    if known is None or job not in known.ids:
        write_job(launch, JobRecord(ids=(job,), log=str(run_dir / "logs" / "job-%j.log")))
