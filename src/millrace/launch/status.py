"""Where a run stands, read from its folder and from Slurm: on this machine or in a job, running or not."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from millrace.cascade.ledger import Ledger, standing
from millrace.config.errors import ConfigError
from millrace.config.placement import Placement, read_placement
from millrace.config.schema import EvaluateStage, Recipe
from millrace.errors import MillraceError
from millrace.launch.job import CURRENT, JobRecord, read_job
from millrace.launch.local import failure_log
from millrace.launch.queue import JobState, SlurmError, states
from millrace.launch.run_dir import LOCK, is_locked, recorded_recipe
from millrace.launch.slurm import cancel
from millrace.observe.writer import read_metrics
from millrace.rollout.rendezvous import LAUNCH_FOLDER, PLACEMENT, Rendezvous, read_json

RATE_STEPS = 10
"""The rate is that of so many last steps."""
TAIL_LINES = 20


def status_lines(run_dir: Path) -> list[str]:
    """What a person should know of a run, one line each. Raises ConfigError for a folder that holds none."""
    recipe = recorded_recipe(run_dir)
    if recipe is None:
        raise ConfigError(f"{run_dir} holds no run: it has no recipe.yaml")
    record = read_job(run_dir / LAUNCH_FOLDER)
    return [*_where(run_dir, record), *_progress(recipe, run_dir), *_endings(run_dir, record)]


def cancel_run(run_dir: Path) -> str:
    """Stop a run: its jobs, or the process on this machine. Returns what was done."""
    record = read_job(run_dir / LAUNCH_FOLDER)
    alive = [state.id for state in states(record.ids) if state.alive] if record else []
    if alive:
        cancel(alive)
        return f"cancelled Slurm job {', '.join(alive)}; the run goes on where it stood when it is launched again"
    if is_locked(run_dir):
        holder = (run_dir / LOCK).read_text(encoding="utf-8").strip()
        try:
            os.kill(int(holder), signal.SIGINT)
        except (ValueError, ProcessLookupError):
            raise MillraceError(
                f"{run_dir} is in use by process {holder} of another machine than {socket.gethostname()}; stop it there"
            ) from None
        return f"asked process {holder} to save and stop"
    return f"{run_dir}: nothing runs"


def log_file(run_dir: Path, name: str | None) -> Path:
    """A log of a run: that of a component such as rank-1 or engine-0, else the job's, else the run's own."""
    folder = run_dir / "logs"
    if name is not None:
        wanted = folder / f"{name}.log"
        if not wanted.exists():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.log")))
            raise ConfigError(f"{run_dir} has no log of {name}; it has {known or 'none'}")
        return wanted
    jobs = sorted(folder.glob("job-*.log"), key=lambda file: file.stat().st_mtime)
    found = jobs[-1] if jobs else folder / "run.log"
    if not found.exists():
        raise ConfigError(f"{run_dir} has no log yet")
    return found


def follow(file: Path, goes_on: bool) -> Iterator[str]:
    """The text of a log, and with `goes_on` what is added to it from then on."""
    with file.open(encoding="utf-8", errors="replace") as log:
        while True:
            if text := log.read():
                yield text
            elif not goes_on:
                return
            else:
                time.sleep(0.5)


# ---- where


def _where(run_dir: Path, record: JobRecord | None) -> Iterator[str]:
    if record is None:
        running = is_locked(run_dir)
        holder = (run_dir / LOCK).read_text(encoding="utf-8").strip() if running else ""
        yield f"{run_dir}: runs, process {holder}" if running else f"{run_dir}: does not run"
        return
    try:
        known = states(record.ids)
    except SlurmError as error:
        yield f"{run_dir}: launched as Slurm job {', '.join(record.ids)}; {error}"
        return
    for state in known:
        yield f"{run_dir}: Slurm job {_sentence(state)}"
    if any(state.state == "RUNNING" for state in known):
        yield from _nodes(run_dir)


def _sentence(job: JobState) -> str:
    said = f"{job.id} {job.state}"
    if job.nodes:
        said += f" on {job.nodes}"
    if job.state == "PENDING" and job.reason:
        said += f", waits for {job.reason}"
    if job.exit_code and not job.alive:
        said += f", exit code {job.exit_code.split(':')[0]}"
    return f"{said} ({job.note})" if job.note else said


def _nodes(run_dir: Path) -> Iterator[str]:
    """What each node of the present job does."""
    meeting, placement = _meeting(run_dir), read_placement(run_dir / LAUNCH_FOLDER / PLACEMENT)
    for number in range(placement.nodes):
        state = meeting.node(number) if meeting else None
        where = f"{state.host} ({state.address})" if state else "has not come yet"
        yield f"  node {number}  {where}  {'; '.join(node_parts(placement, number))}"


def node_parts(placement: Placement, node: int) -> Iterator[str]:
    """What a node does."""
    for ranks in placement.trainer:
        if ranks.node == node:
            last = ranks.first_rank + ranks.ranks - 1
            yield f"rank {last}" if ranks.ranks == 1 else f"ranks {ranks.first_rank} to {last}"
    servers = [f"{server.kind}-{server.index}" for server in placement.servers if server.node == node]
    if servers:
        yield ", ".join(servers)
    for verifier in placement.verifiers:
        if verifier.node == node:
            yield f"{verifier.workers} verifiers"


def _meeting(run_dir: Path) -> Rendezvous | None:
    """The rendezvous of the job's present or last start."""
    current = read_json(run_dir / LAUNCH_FOLDER / CURRENT).get("job")
    return Rendezvous(run_dir / LAUNCH_FOLDER / current) if current else None


# ---- how far


def _progress(recipe: Recipe, run_dir: Path) -> Iterator[str]:
    events, names = Ledger(run_dir).events(), [stage.name for stage in recipe.stages]
    done = standing(events, names)
    finished = "all" if len(done.finished) == len(names) else ", ".join(done.finished) or "none"
    yield f"stages done: {finished} of {', '.join(names)}"
    rows = read_metrics(run_dir / "metrics.jsonl")
    if rows and rows[-1]["stage"] not in done.finished:
        yield f"in {rows[-1]['stage']}, {_step(recipe, rows)}{_rate(rows)}"
    checkpoints = [path for path in (run_dir / "checkpoints").glob("*") if path.is_dir() and path.name[0] != "."]
    if checkpoints:
        last = max(checkpoints, key=lambda path: path.stat().st_mtime)
        yield f"last checkpoint: {last.name}, {_ago(last.stat().st_mtime)}"
    word = run_dir / "logs" / "run.log"
    if word.exists() and (lines := word.read_text(encoding="utf-8", errors="replace").splitlines()):
        yield f"last word: {lines[-1]}"


def _step(recipe: Recipe, rows: list[dict]) -> str:  # type: ignore[type-arg]
    """The last step, counted as the lines of the run count: from the beginning of its stage."""
    stage = rows[-1]["stage"]
    steps = {one.name: one.steps for one in recipe.stages if not isinstance(one, EvaluateStage)}.get(stage)
    step = sum(row["stage"] == stage for row in rows)
    return f"step {step} of {steps}" if steps else f"step {step}"


def _rate(rows: list[dict]) -> str:  # type: ignore[type-arg]
    """Seconds a step of the present stage, if they were measured."""
    stage = rows[-1]["stage"]
    times = [row.get("time/step", row.get("time/train")) for row in rows[-RATE_STEPS:] if row["stage"] == stage]
    measured = [seconds for seconds in times if seconds is not None]
    return f", {sum(measured) / len(measured):.3g} s a step" if measured else ""


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _endings(run_dir: Path, record: JobRecord | None) -> Iterator[str]:
    """Why the last start failed: of a job by its failure.json, or, when a node died without a word, by the end of its
    log; on this machine by what was put on record there."""
    if record is None:
        if (here := failure_log(run_dir)).exists():
            yield f"failed: {here.read_text(encoding='utf-8', errors='replace').rstrip()}"
        return
    meeting = _meeting(run_dir)
    failure = meeting.failure() if meeting else None
    if failure is not None:
        yield f"failed: {failure}"
    elif _failed(record):
        log = Path(record.log.replace("%j", record.ids[-1]))
        if log.exists():
            yield f"the end of {log}:"
            yield from log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]


def _failed(record: JobRecord) -> bool:
    try:
        return any(state.state in ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY") for state in states(record.ids))
    except SlurmError:
        return False
