"""Runs as experiments of NeMo-Run, from an environment that launches: the same weights, and failures that show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from real_runs import SFT, exported, write_world
from slurm_runs import SHORT_RL, millrace, run_dir_of, said, write_site, write_wide_recipe

ROOT = Path(__file__).parents[2]
LIBRARY = """
import sys
import nemo_run as run
from millrace.config.loading import load_recipe
from millrace.launch.nemo_run import experiment

recipe, site = sys.argv[1:]
executor = run.SlurmExecutor(account="lab", time="00:05:00", packager=run.Packager())
with experiment(load_recipe(recipe), executor, cluster=site) as built:
    built.run()
"""


@pytest.fixture(scope="module")
def launcher() -> Path:
    """The interpreter of an environment that launches through NeMo-Run."""
    folder = ROOT / ".venv-nemo-run"
    made = subprocess.run(
        [ROOT / "constraints" / "nemo-run.sh", folder],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        pytest.skip(
            f"no environment for NeMo-Run can be made here: {(made.stderr.strip() or 'no word').splitlines()[-1]}"
        )
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("a world of experiments"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nemo-run")


def site_of(world: Path, python: str = sys.executable) -> Path:
    site = write_site(world, account="lab")
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "python": python}))
    return site


def launched(launcher: Path, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(launcher), *map(str, arguments)],
        env={**os.environ, "NEMORUN_HOME": str(home)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )


def launch(launcher: Path, home: Path, recipe: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return launched(launcher, home, "-m", "millrace.cli", "launch", recipe, *options)


def test_an_experiment_on_slurm_ends_with_the_weights_of_a_local_run(cluster, world, launcher, home, local_cascade):
    recipe = write_wide_recipe(world, "experiment", stages=[SFT, SHORT_RL], domains=True)
    done = launch(launcher, home, recipe, "--cluster", site_of(world), "--executor", "slurm")
    assert done.returncode == 0, done.stdout + done.stderr + said(recipe)
    ours = exported(run_dir_of(recipe))
    assert ours.keys() == local_cascade.keys()
    assert all(torch.equal(ours[name], local_cascade[name]) for name in ours)
    status = millrace("status", run_dir_of(recipe)).stdout
    assert "COMPLETED on 127.0.0.[11-14]" in status


def test_a_task_that_fails_is_an_exit_code_and_a_sentence(cluster, world, launcher, home):
    recipe = write_wide_recipe(world, "failing", stages=[SFT])
    done = launched(launcher, home, "-c", LIBRARY, recipe, site_of(world, "/bin/false"))
    assert done.returncode == 1
    assert "ExperimentFailed: of the experiment failing_" in done.stderr
    assert "job is FAILED; its files are in" in done.stderr


def test_what_slurm_refuses_is_a_sentence(cluster, world, launcher, home):
    recipe = write_wide_recipe(world, "refused", stages=[SFT])
    site = write_site(world, account="lab", partition="nowhere")
    done = launch(launcher, home, recipe, "--cluster", site, "--executor", "slurm")
    assert done.returncode == 1
    assert "sbatch refused a task of refused_" in done.stderr.splitlines()[-1]
    assert "invalid partition specified: nowhere" in done.stderr.splitlines()[-1]


def test_a_chain_runs_one_stage_behind_the_other_on_this_machine(world, launcher, home):
    recipe = write_wide_recipe(world, "chain", stages=[SFT, {**SFT, "name": "more"}])
    site = site_of(world)
    done = launch(launcher, home, recipe, "--executor", "local", "--cluster", site, "--chain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert exported(run_dir_of(recipe))
    broken = write_wide_recipe(world, "broken", stages=[SFT, {**SFT, "name": "more"}])
    done = launch(launcher, home, broken, "--executor", "local", "--cluster", site_of(world, "/bin/false"), "--chain")
    assert done.returncode == 1
    assert "job-sft is FAILED" in done.stderr.splitlines()[-1]


def test_nemo_knows_the_command(world, launcher, home):
    recipe, site = write_wide_recipe(world, "dry", stages=[SFT]), site_of(world)
    arguments = ["launch", f"recipe={recipe}", f"cluster={site}", "--dryrun", "--yes"]
    done = launched(launcher.with_name("nemo"), home, "millrace", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not run_dir_of(recipe).exists(), "a dry run makes nothing"
    assert "#SBATCH --nodes=2" in done.stdout and "#SBATCH --signal=USR1@60" in done.stdout


def test_without_nemo_run_the_way_to_it_is_said(world):
    recipe = write_wide_recipe(world, "without", stages=[SFT])
    done = millrace("launch", recipe, "--executor", "local")
    assert done.returncode == 2
    assert "constraints/nemo-run.sh" in done.stderr and len(done.stderr.splitlines()) == 1
