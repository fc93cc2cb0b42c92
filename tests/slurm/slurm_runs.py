"""Runs that are launched on the tests' cluster: their recipes, launching, waiting, what they left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml
from cluster import ENDED, Cluster
from real_runs import RL, write_recipe

from millrace.observe.writer import read_metrics

LIMIT = 480.0
OF_A_RUN = re.compile(r"millrace\.(launch\.node|cascade\.worker|rollout\.|environments\.sandbox\.serve)|vllm")
SHORT_RL = {**RL, "steps": 3, "prompts_per_step": 2, "sampling": {"max_response_tokens": 48}}


def write_site(world: Path, **slurm: object) -> Path:
    """A cluster file of the tests' cluster."""
    site = {
        "name": "trial",
        "nodes": 4,
        "node": {"gpus": 0, "cores": 2, "slots": 2, "memory_gib": 2},
        "slurm": {"time_limit": "00:30:00", "warn_s": 60, "request": "none", "exclusive": False, **slurm},
    }
    path = world / f"site{len(list(world.glob('site*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(site), encoding="utf-8")
    return path


def write_wide_recipe(world: Path, name: str, *, stages: list[dict], domains: bool = False) -> Path:
    """A recipe whose two ranks are on two nodes, and its two engines on two others."""
    path = write_recipe(world, name, stages=stages, domains=domains, placement={"trainer_nodes": 2})
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if domains:
        recipe["fleet"] |= {"engines": 2, "transport": "disk"}
        recipe["placement"]["server_nodes"] = 2
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def run_dir_of(recipe: Path) -> Path:
    return recipe.parent / "runs" / recipe.stem


def millrace(*arguments: object, cwd: Path | str = "/", **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "millrace.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def launch(recipe: Path, site: Path, *options: str) -> list[str]:
    """Launch a run from another directory; the numbers of its jobs."""
    done = millrace("launch", recipe, "--cluster", site, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    ids = json.loads((run_dir_of(recipe) / "launch" / "job.json").read_text(encoding="utf-8"))["ids"]
    assert f"Slurm job {', '.join(ids)}" in done.stdout
    return ids


def steps_of(recipe: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir_of(recipe) / "metrics.jsonl")]


def said(recipe: Path) -> str:
    """All that the jobs of a run have written."""
    logs = sorted((run_dir_of(recipe) / "logs").glob("*.log"))
    return "\n".join(f"== {log.name}\n{log.read_text(encoding='utf-8', errors='replace')}" for log in logs)


def until(condition: Callable[[], bool], recipe: Path, limit: float = LIMIT) -> float:
    """Wait; returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, f"waited {limit:g} s in vain:\n{said(recipe)}"
        time.sleep(0.05)
    return time.monotonic() - began


def finish(cluster: Cluster, job: str, recipe: Path) -> None:
    """Wait until a job has done its work."""
    state = cluster.wait_for(job, set(ENDED), LIMIT)
    assert state == "COMPLETED", f"{state}:\n{said(recipe)}"


def processes_of(recipe: Path) -> list[psutil.Process]:
    """What of a run is alive: nodes, ranks and servers name its folder or its world on their command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if OF_A_RUN.search(line) and str(recipe.parent) in line:
            found.append(process)
    return found


def rank_process(recipe: Path, rank: int) -> psutil.Process:
    ranks = [p for p in processes_of(recipe) if "millrace.cascade.worker" in p.cmdline()]
    return next(process for process in ranks if process.environ().get("RANK") == str(rank))
