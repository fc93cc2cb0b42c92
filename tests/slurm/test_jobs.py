"""Runs as jobs of a real Slurm cluster: trainer and engines on nodes of their own, disturbed, crashed, refused."""

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from real_runs import SFT, exported, write_world
from real_runs import run as run_here
from slurm_runs import (
    SHORT_RL,
    finish,
    launch,
    millrace,
    processes_of,
    rank_process,
    run_dir_of,
    said,
    steps_of,
    until,
    write_site,
    write_wide_recipe,
)

from millrace.cascade.ledger import Ledger
from millrace.launch.job import read_job
from millrace.rollout.rendezvous import Rendezvous

LONG_SFT = {**SFT, "steps": 120}
WARNED_SECONDS = 6.0
"""Slurm looks for jobs to preempt every two seconds."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("a world of its own"))


@pytest.fixture(scope="module")
def site(world):
    return write_site(world)


@pytest.fixture(scope="module")
def undisturbed(world):
    """The export of the long run on this machine."""
    recipe = write_wide_recipe(world, "undisturbed", stages=[LONG_SFT])
    assert run_here(recipe) == 0
    return exported(run_dir_of(recipe))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, first {different[0]}"


def let_go(held):
    """Resume a suspended rank, unless Slurm did so before, with the signal that it sent."""
    with suppress(psutil.NoSuchProcess):
        held.resume()


def preempt(cluster, held):
    """A job of a higher partition that wants every core; returns when it has run. `held` is a suspended rank, which
    goes on when the preempted job has been warned."""
    asked = ["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=4"]
    asked += ["--output=/dev/null", "--wrap=sleep 1"]
    job = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    time.sleep(WARNED_SECONDS)
    let_go(held)
    cluster.wait_for(job, {"COMPLETED"}, 180)


@pytest.mark.slow
def test_a_cascade_on_four_nodes_is_preempted_and_ends_with_the_weights_of_a_local_run(
    cluster, world, site, local_cascade
):
    recipe = write_wide_recipe(world, "job", stages=[SFT, SHORT_RL], domains=True)
    run_dir = run_dir_of(recipe)
    (job,) = launch(recipe, site)
    until((run_dir / "rollouts" / "rl" / "step-000000.jsonl").exists, recipe)
    rank = rank_process(recipe, 0)
    rank.suspend()  # or else the stage might end before all this is asked

    status = millrace("status", run_dir).stdout
    assert f"Slurm job {job} RUNNING on 127.0.0.[11-14]" in status
    for node, part in enumerate(["rank 0", "rank 1", "engine-0", "engine-1"]):
        assert f"node {node}  127.0.0.{11 + node} (127.0.0.{11 + node})  {part}" in status
    assert_token_is_secret(run_dir / "launch" / f"{job}.0", recipe)
    assert "is in use by Slurm job" in millrace("launch", recipe, "--cluster", site).stderr

    preempt(cluster, held=rank)
    cluster.start_now(job)
    finish(cluster, job, recipe)
    assert "resuming at step" in said(recipe)
    assert_same(exported(run_dir), local_cascade)
    assert list(Ledger(run_dir).scores()) == ["start", "sft", "rl@2", "rl"]
    assert not processes_of(recipe)
    assert f"Slurm job {job} COMPLETED" in millrace("status", run_dir).stdout


def assert_token_is_secret(folder, recipe):
    token = Rendezvous(folder).token()
    assert len(token) > 30
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not any(token in " ".join(process.cmdline()) for process in processes_of(recipe))
    assert token not in said(recipe)
    assert not any(token in script.read_text() for script in folder.parent.glob("*.sbatch"))


def by_a_node_set_down(cluster, job, recipe):
    node = cluster.nodes_of(job)[1]
    cluster.set_down(node)
    cluster.wait_for(job, {"PENDING"}, 120)
    cluster.bring_back(node)
    cluster.start_now(job)


def by_the_end_of_slurmd(cluster, job, recipe):
    node, rank = cluster.nodes_of(job)[1], rank_process(recipe, 1)
    rank.suspend()  # or else the steps might end before Slurm misses the node
    cluster.kill_node(node)
    try:
        cluster.wait_for(job, {"PENDING"}, 120)
    finally:
        let_go(rank)
    # Also those of the node that Slurm does not reach. In an all-reduce gloo does not always see that its peer died;
    # the node then waits a minute for a sign of life.
    until(lambda: not processes_of(recipe), recipe, 120)
    cluster.bring_back(node)
    cluster.start_now(job)


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [by_a_node_set_down, by_the_end_of_slurmd])
def test_a_job_that_is_disturbed_goes_on_by_itself_and_loses_no_bit(cluster, world, undisturbed, site, disturb):
    recipe = write_wide_recipe(world, disturb.__name__, stages=[LONG_SFT])
    (job,) = launch(recipe, site)
    until(lambda: len(steps_of(recipe)) > 8, recipe)
    disturb(cluster, job, recipe)
    finish(cluster, job, recipe)
    assert "resuming at step" in said(recipe)
    assert_same(exported(run_dir_of(recipe)), undisturbed)
    assert steps_of(recipe) == list(range(1, LONG_SFT["steps"] + 1))
    assert not processes_of(recipe)


@pytest.mark.slow
def test_the_time_limit_saves_the_run_before_it_comes(cluster, world, undisturbed):
    recipe = write_wide_recipe(world, "limited", stages=[LONG_SFT])
    (job,) = launch(recipe, write_site(world, time_limit="00:01:00", warn_s=30))
    # Slurm warns up to a minute early, so that it may take some starts.
    starts = 0
    while starts == 0 or (cluster.settled(job) == "PENDING" and starts < 6):
        if starts:
            cluster.start_now(job)
        cluster.wait_for(job, {"RUNNING"}, 120)
        starts += 1
        if starts == 1:
            _hold_until_warned(recipe)
    finish(cluster, job, recipe)
    assert starts > 1 and "stopped as asked" in said(recipe)
    assert_same(exported(run_dir_of(recipe)), undisturbed)


def _hold_until_warned(recipe):
    """Let a job that has begun not end before Slurm warns it, which is half a minute before its minute is over."""
    began = time.monotonic()
    until(lambda: len(steps_of(recipe)) > 8 or "stopped as asked" in said(recipe), recipe)
    if "stopped as asked" not in said(recipe):
        rank = rank_process(recipe, 0)
        rank.suspend()
        time.sleep(max(0.0, 36.0 - (time.monotonic() - began)))
        let_go(rank)


@pytest.mark.slow
def test_a_cancelled_run_ends_with_nothing_left_and_goes_on_when_it_is_launched_again(
    cluster, world, undisturbed, site
):
    recipe = write_wide_recipe(world, "cancelled", stages=[LONG_SFT])
    (job,) = launch(recipe, site)
    until(lambda: len(steps_of(recipe)) > 8, recipe)
    assert f"cancelled Slurm job {job}" in millrace("cancel", run_dir_of(recipe)).stdout
    cluster.wait_for(job, {"CANCELLED"}, 120)
    until(lambda: not processes_of(recipe), recipe, 60)
    assert "nothing runs" in millrace("cancel", run_dir_of(recipe)).stdout
    (again,) = launch(recipe, site)
    finish(cluster, again, recipe)
    assert "resuming at step" in said(recipe)
    assert_same(exported(run_dir_of(recipe)), undisturbed)


def test_a_stage_chain_runs_one_job_behind_the_other(cluster, world, site):
    stages = [SFT, {**SFT, "name": "more"}]
    recipe = write_wide_recipe(world, "chain", stages=stages)
    first, second = launch(recipe, site, "--chain")
    finish(cluster, first, recipe)
    assert not (run_dir_of(recipe) / "export").exists()
    finish(cluster, second, recipe)
    assert exported(run_dir_of(recipe))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_ends_the_job_within_thirty_seconds_with_its_reason_in_one_place(cluster, world, site, rank):
    recipe = write_wide_recipe(world, f"crashed-{rank}", stages=[{**SFT, "steps": 10_000}])
    (job,) = launch(recipe, site)
    until(lambda: len(steps_of(recipe)) > 5, recipe)
    node = cluster.nodes_of(job)[rank]
    rank_process(recipe, rank).kill()
    assert until(lambda: not processes_of(recipe), recipe) < 30
    assert cluster.wait_for(job, {"FAILED"}, 30) == "FAILED"
    failure = Rendezvous(run_dir_of(recipe) / "launch" / f"{job}.0").failure()
    assert failure.node == rank and failure.component == "trainer"
    assert failure.reason.startswith(f"rank {rank} was ended by SIGKILL")
    status = millrace("status", run_dir_of(recipe)).stdout
    assert f"failed: node {rank} ({node}), trainer: rank {rank} was ended by SIGKILL" in status


def test_a_node_that_dies_without_a_word_ends_the_job_and_its_log_says_so(cluster, world, site):
    recipe = write_wide_recipe(world, "silenced", stages=[{**SFT, "steps": 10_000}])
    (job,) = launch(recipe, site)
    until(lambda: len(steps_of(recipe)) > 5, recipe)
    node = cluster.nodes_of(job)[1]
    psutil.Process(rank_process(recipe, 1).ppid()).kill()
    assert until(lambda: not processes_of(recipe), recipe) < 30
    assert cluster.wait_for(job, {"FAILED"}, 30) == "FAILED"
    status = millrace("status", run_dir_of(recipe)).stdout
    assert f"failed: node 1 ({node}): gave no sign of life for 1" in status


def test_a_container_has_the_folders_of_the_recipe_and_nothing_beside_them(cluster, tmp_path):
    world = write_world(tmp_path / "a world in a box")
    (tmp_path / "beside").write_text("not mounted")
    image = tmp_path.with_name(f"{tmp_path.name}.image")
    image.write_text(f"{tmp_path}\n")
    inside = ["srun", f"--container-image={image}", f"--container-mounts={world}/base:{world}/base", "ls"]
    assert subprocess.run([*inside, tmp_path], capture_output=True, text=True).stdout.split("\n")[:-1] == [world.name]
    assert subprocess.run([*inside, world], capture_output=True, text=True).stdout.split() == ["base"]

    recipe, here = (write_wide_recipe(world, name, stages=[SFT]) for name in ("boxed", "here"))
    site = write_site(world)
    container = {"container": {"image": str(image)}, "python": sys.executable}
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), **container}))
    (job,) = launch(recipe, site)
    finish(cluster, job, recipe)
    assert run_here(here) == 0
    assert_same(exported(run_dir_of(recipe)), exported(run_dir_of(here)))


@pytest.fixture
def foreign_world():
    """A world that belongs to another user."""
    folder = Path(tempfile.mkdtemp(prefix="of-somebody-else-"))
    yield write_world(folder)
    shutil.rmtree(folder)


def test_another_user_launches_a_run(cluster, foreign_world):
    user, python = "nobody", foreign_world / "python"
    # The system's interpreter with this one's packages: the folder of the latter may be closed to others.
    (foreign_world / "sitecustomize.py").write_text(
        f"import site\nsite.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{foreign_world}" exec /usr/bin/python3 "$@"\n')
    python.chmod(0o755)
    recipe = write_wide_recipe(foreign_world, "foreign", stages=[SFT])
    site = write_site(foreign_world)
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "python": str(python)}))
    for path in (foreign_world, *foreign_world.rglob("*")):
        shutil.chown(path, user)

    def as_user(*arguments):
        command, home = [str(python), *map(str, arguments)], {"HOME": str(foreign_world)}
        return subprocess.run(
            command, user=user, cwd="/", env={**os.environ, **home}, capture_output=True, text=True, timeout=240
        )

    tried = as_user("-c", "import millrace.cli, torch")
    if tried.returncode != 0:
        pytest.skip(f"{user} cannot run Millrace from here: {(tried.stderr.strip() or 'no word').splitlines()[-1]}")
    cluster.admit(user)
    done = as_user("-m", "millrace.cli", "launch", recipe, "--cluster", site)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = read_job(run_dir_of(recipe) / "launch").ids
    finish(cluster, job, recipe)
    assert exported(run_dir_of(recipe))
    assert {path.owner() for path in run_dir_of(recipe).rglob("*")} == {user}


@pytest.mark.parametrize(
    ("slurm", "said"),
    [
        ({"account": "nobody"}, r"Slurm refused the job (account nobody, "),
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"options": ["--nonsense=1"]}, "unrecognized option '--nonsense=1'"),
    ],
)
def test_what_slurm_refuses_is_one_sentence(cluster, world, slurm, said):
    recipe = write_wide_recipe(world, f"refused-{next(iter(slurm))}", stages=[SFT])
    done = millrace("launch", recipe, "--cluster", write_site(world, **slurm))
    assert done.returncode == 1
    assert said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_without_sacct_the_status_is_had_from_the_controller(cluster, world, site, tmp_path):
    recipe = write_wide_recipe(world, "brief", stages=[SFT])
    (job,) = launch(recipe, site)
    finish(cluster, job, recipe)
    for command in ("squeue", "scontrol"):
        (tmp_path / command).symlink_to(f"/usr/bin/{command}")
    done = millrace("status", run_dir_of(recipe), PATH=str(tmp_path))
    assert f"Slurm job {job} COMPLETED" in done.stdout
