"""Resuming equals not stopping: bit for bit, wherever the run was when it was killed."""

import os
import random
import signal
import time

import psutil
import pytest
import torch
from real_runs import RL, SFT, exported, finish, kill, output, run, start, wait_until, write_recipe, write_world

from millrace.cascade.ledger import Ledger
from millrace.observe.lines import read_lines
from millrace.observe.writer import read_metrics

KILLS = int(os.environ.get("MILLRACE_KILLS", "5"))
STEPS = 12 * KILLS
"""The kills of a start come after a step or two on slow machines, and a dozen on fast ones."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def assert_same_export(one, other):
    ours, theirs = exported(one), exported(other)
    assert ours.keys() == theirs.keys() and ours
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, first {different[0]}"


def saving(run_dir) -> bool:
    folder = run_dir / "checkpoints"
    return folder.exists() and any(entry.name.startswith(".") for entry in folder.iterdir())


@pytest.mark.slow
def test_kills_at_random_moments_and_in_saves_change_no_bit(world):
    steps = {**SFT, "steps": STEPS}
    whole = write_recipe(world, "whole", stages=[steps], domains=False)
    assert run(whole) == 0, output(whole)

    killed = write_recipe(world, "killed", stages=[steps], domains=False)
    run_dir, draw, in_save = world / "runs" / "killed", random.Random(11), 0
    for number in range(KILLS):
        process = start(killed)
        if number % 3 == 0:  # while it starts, or soon after
            time.sleep(draw.uniform(1.0, 6.0))
            alive = process.poll() is None
        elif number % 3 == 1:
            alive = wait_until(lambda: saving(run_dir), process, killed)
        else:
            goal = len(metric_steps(run_dir)) + draw.randint(1, 12)
            alive = wait_until(lambda goal=goal: len(metric_steps(run_dir)) >= goal, process, killed)
            time.sleep(draw.uniform(0.0, 0.3))
        assert alive, "the run ended before all kills; give it more steps"
        in_save += saving(run_dir)
        kill(process)
    assert in_save >= KILLS // 5, "too few of the kills hit a save for this test to mean anything"
    assert run(killed) == 0, output(killed)
    assert_same_export(world / "runs" / "whole", run_dir)
    assert metric_steps(run_dir) == list(range(1, STEPS + 1))
    assert [file.name for file in (run_dir / "data-index").iterdir()] == [steps["name"]]


def test_a_stop_while_conversations_are_read_ends_the_run_at_once_and_in_order(world):
    rows = (world / "sft.jsonl").read_text(encoding="utf-8")
    (world / "many.jsonl").write_text(rows * 1500, encoding="utf-8")
    recipe = write_recipe(world, "reading", stages=[{**SFT, "data": ["many.jsonl"]}], domains=False)
    run_dir = world / "runs" / "reading"
    process = start(recipe)
    assert wait_until((run_dir / "logs" / "run.log").exists, process, recipe), output(recipe)
    time.sleep(3.0)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert finish(process, recipe) == 130, output(recipe)
    assert time.monotonic() - asked < 30, output(recipe)
    assert "stopped as asked while the data were read" in output(recipe) and "Traceback" not in output(recipe)
    assert not (run_dir / "data-index").exists() and psutil.wait_procs(tree, timeout=5)[1] == []


@pytest.fixture(scope="module")
def undisturbed(world):
    recipe = write_recipe(world, "cascade", stages=[SFT, RL], domains=True)
    assert run(recipe) == 0, output(recipe)
    return world / "runs" / "cascade"


@pytest.mark.slow
def test_an_engine_that_is_killed_in_a_stage_is_replaced_and_changes_no_bit(world, undisturbed):
    recipe = write_recipe(world, "bereft", stages=[SFT, RL], domains=True)
    process = start(recipe)
    first_rollouts = world / "runs" / "bereft" / "rollouts" / "rl" / "step-000000.jsonl"
    assert wait_until(first_rollouts.exists, process, recipe), output(recipe)
    servers = engines_of(process)
    servers[0].kill()
    assert finish(process, recipe) == 0, output(recipe)
    assert "restarting" in output(recipe)
    assert_same_export(undisturbed, world / "runs" / "bereft")


def engines_of(process) -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [member for member in family if "vllm.entrypoints" in " ".join(member.cmdline())]


@pytest.mark.slow
def test_a_cascade_that_was_interrupted_and_killed_ends_where_an_undisturbed_one_does(world, undisturbed):
    broken = write_recipe(world, "broken", stages=[SFT, RL], domains=True)
    run_dir = world / "runs" / "broken"
    process = start(broken)
    assert wait_until(lambda: bool(metric_steps(run_dir)), process, broken)
    process.send_signal(signal.SIGINT)
    assert finish(process, broken) == 130, output(broken)
    assert "stopped as asked" in output(broken)

    process = start(broken)
    assert wait_until(lambda: "resuming at step" in output(broken), process, broken), output(broken)
    process.send_signal(signal.SIGINT)  # the engines are starting
    began = time.monotonic()
    assert finish(process, broken) == 130, output(broken)
    assert time.monotonic() - began < 30
    assert output(broken).count("stopped as asked") == 2

    process = start(broken)
    second_rollouts = run_dir / "rollouts" / "rl" / "step-000001.jsonl"
    assert wait_until(second_rollouts.exists, process, broken), output(broken)
    engines = engines_of(process)
    assert engines
    kill(process)
    assert not any(p.is_running() for p in engines), "an engine outlived its run"

    assert run(broken) == 0, output(broken)
    assert_same_export(undisturbed, run_dir)
    assert (run_dir / "report.html").exists()
    assert list(Ledger(run_dir).scores()) == ["start", "sft", "rl@2", "rl"]


@pytest.mark.slow
def test_one_step_off_each_batch_is_of_the_weights_before_and_a_run_that_was_disturbed_loses_no_bit(
    world, standing_engine
):
    stage = {**RL, "steps": 5, "one_step_off": True, "optimizer": {"lr": 1.0e-4}}
    whole = write_recipe(world, "ahead", stages=[stage], domains=True, fleet=standing_engine)
    assert run(whole) == 0, output(whole)
    # Two updates a step: the first two batches are of the weights at the start, each further one of those a step ago.
    assert [sampled_with(world / "runs" / "ahead", step) for step in range(5)] == [{0}, {0}, {2}, {4}, {6}]
    rows = read_metrics(world / "runs" / "ahead" / "metrics.jsonl")
    assert "sampling/seconds" not in rows[0] and all(row["sampling/seconds"] > 0 for row in rows[1:])

    disturbed = write_recipe(world, "disturbed", stages=[stage], domains=True, fleet=standing_engine)
    run_dir = world / "runs" / "disturbed"
    process = start(disturbed)
    ahead = run_dir / "rollouts" / "rl" / "step-000003.jsonl"
    assert wait_until(ahead.exists, process, disturbed), output(disturbed)
    kill(process)  # the batch is on record, the step beside which it was sampled perhaps not
    process = start(disturbed)
    assert wait_until(lambda: "resuming at step" in output(disturbed), process, disturbed), output(disturbed)
    assert wait_until(lambda: "trains on its recorded rollouts" in output(disturbed), process, disturbed)
    process.send_signal(signal.SIGINT)
    assert finish(process, disturbed) in (0, 130), output(disturbed)
    assert run(disturbed) == 0, output(disturbed)
    assert_same_export(world / "runs" / "ahead", run_dir)


def sampled_with(run_dir, step) -> set[int]:
    """The weights that a step's answers come from, as their engines say."""
    lines = read_lines(run_dir / "rollouts" / "rl" / f"step-{step:06d}.jsonl")
    return {line["weight_version"] for line in lines}


def metric_steps(run_dir) -> list[int]:
    path = run_dir / "metrics.jsonl"
    return [row["step"] for row in read_metrics(path)] if path.exists() else []
