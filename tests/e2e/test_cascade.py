"""A whole cascade with a side branch and distillation: killed, gated, cut short, rewound, with a damaged ledger."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from real_runs import (
    RL,
    SFT,
    exported,
    kill,
    output,
    run,
    start,
    wait_until,
    write_recipe,
    write_world,
)

from millrace.cascade.ledger import Ledger
from millrace.observe.writer import read_metrics

KILLS = int(os.environ.get("MILLRACE_KILLS", "10"))
START_SECONDS = 3.0
"""No run has its ranks up so soon."""
BRANCH = {**RL, "name": "branch", "from": "sft", "steps": 3, "updates_per_batch": 1, "loss": {}, "kl": {}}
MOPD = {
    "type": "mopd",
    "name": "mopd",
    "from": "rl",
    "steps": 4,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "sampling": {"max_response_tokens": 24},
    "teachers": {"if": "stage(branch)"},
    "rewarded": ["colours"],
    "optimizer": {"lr": 1.0e-3, "warmup_steps": 2},
}
STAGES = [SFT, RL, BRANCH, MOPD]


@dataclass(frozen=True)
class World:
    folder: Path
    fleet: dict


@pytest.fixture(scope="module")
def world(tmp_path_factory, standing_engine):
    return World(write_world(tmp_path_factory.mktemp("world")), standing_engine)


def cascade(world: World, name: str, stages: list[dict] = STAGES) -> tuple[Path, Path]:
    """A recipe of two domains, and the folder of its run."""
    path = write_recipe(world.folder, name, stages=stages, domains=True, fleet=world.fleet)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["domains"]["colours"] = recipe["domains"]["if"]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path, world.folder / "runs" / name


@pytest.fixture(scope="module")
def undisturbed(world):
    recipe, run_dir = cascade(world, "whole")
    assert run(recipe) == 0, output(recipe)
    return run_dir


def assert_same_export(one: Path, other: Path) -> None:
    ours, theirs = exported(one), exported(other)
    assert ours.keys() == theirs.keys() and ours
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, first {different[0]}"


def finished_stages(run_dir: Path) -> list[str]:
    return [event["stage"] for event in Ledger(run_dir).events("stage_finished")]


def steps_written(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def linger(seconds: float, run_dir: Path, total: int, start_up: float = START_SECONDS) -> None:
    """Let a run go on for so long; not past its start-up when only the last step is left, which may be quick."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if steps_written(run_dir) >= total - 1 and passed >= start_up:
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_a_cascade_records_where_each_stage_came_from_and_what_it_cost(undisturbed):
    ledger = Ledger(undisturbed)
    origins = {event["stage"]: event["parent"] for event in ledger.events("stage_started")}
    assert origins == {"sft": "start", "rl": "sft", "branch": "sft", "mopd": "rl"}
    mopd = ledger.events("stage_started")[-1]
    assert mopd["teachers"] == {"if": "branch"}
    assert mopd["settings"]["teachers"] == {"if": "stage(branch)"} and len(mopd["parent_checksum"]) == 64
    assert all(len(facts["sha256"]) == 64 for facts in mopd["inputs"].values())
    assert finished_stages(undisturbed) == ["sft", "rl", "branch", "mopd"]
    costs = ledger.events("stage_finished")[-1]
    assert costs["seconds"] > 0 and costs["tokens_sampled"] > 0 and costs["flops"] > 6 * costs["tokens_trained"]
    assert ledger.events("exported")[0]["of"] == "mopd"
    assert {"start", "sft", "rl", "rl@2", "branch", "mopd", "mopd@2"} <= set(ledger.scores())


@pytest.mark.slow
def test_a_branch_starts_from_the_weights_of_its_origin(undisturbed):
    rows = {event["after"]: event for event in Ledger(undisturbed).events("evaluated")}
    reverse_kl = [row["reverse_kl/if"] for row in read_metrics(undisturbed / "metrics.jsonl") if row["stage"] == "mopd"]
    assert rows["branch"]["checkpoint"] == "stage-02-branch"
    assert reverse_kl[0] > 1e-3, "student and teacher come from different branches and must differ"


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit_and_repeat_no_stage(world, undisturbed):
    recipe, run_dir = cascade(world, "killed")
    draw, total = random.Random(3), steps_written(undisturbed)
    for number in range(KILLS):
        process = start(recipe)
        if number % 3 == 0:  # while the ranks start, or soon after
            linger(draw.uniform(1.0, 8.0), run_dir, total)
        else:
            goal = min(steps_written(run_dir) + draw.randint(1, 3), total - 1)
            wait_until(lambda goal=goal: steps_written(run_dir) >= goal, process, recipe)
            linger(
                draw.uniform(0.0, 2.0), run_dir, total, start_up=0.0
            )  # somewhere in the step, the save, the evaluation or the gate behind it
        assert process.poll() is None, f"the run ended before all kills:\n{output(recipe)}"
        kill(process)
    assert run(recipe) == 0, output(recipe)
    assert_same_export(undisturbed, run_dir)
    assert finished_stages(run_dir) == ["sft", "rl", "branch", "mopd"]
    assert steps_written(run_dir) == total


@pytest.mark.slow
def test_a_failed_gate_stops_the_run_and_says_why_and_a_loosened_one_lets_it_go_on(world):
    strict = {**SFT, "gate": {"min_gain": 101, "own": ["if"]}}
    recipe, run_dir = cascade(world, "gated", stages=[strict, {**BRANCH, "steps": 1}])
    assert run(recipe) == 3, output(recipe)
    assert "gate of sft failed against start: if" in output(recipe)
    assert finished_stages(run_dir) == ["sft"] and not (run_dir / "export").exists()
    back = {"min_gain": 101, "own": ["if"], "on_failure": "back"}
    cascade(world, "gated", stages=[{**strict, "gate": back}, {**BRANCH, "steps": 1}])
    assert run(recipe) == 0, output(recipe)
    assert "later stages start from start instead" in output(recipe)
    assert Ledger(run_dir).events("stage_started")[-1]["parent"] == "start"
    assert finished_stages(run_dir) == ["sft", "branch"]


@pytest.mark.slow
def test_a_run_goes_as_far_as_it_is_asked_to_and_back_to_a_stage_it_is_told(world, undisturbed):
    recipe, run_dir = cascade(world, "parts")
    assert run(recipe, "--until", "rl") == 0, output(recipe)
    assert finished_stages(run_dir) == ["sft", "rl"] and not (run_dir / "export").exists()
    assert run(recipe) == 0, output(recipe)
    assert_same_export(undisturbed, run_dir)
    assert run(recipe, "--from", "mopd", "--dry-run") == 0, output(recipe)
    assert "to do of 4 steps; taught if by stage(branch) (now branch)" in output(recipe)
    assert run(recipe, "--from", "branch", "stages.branch.optimizer.lr=2e-3") == 0, output(recipe)
    assert finished_stages(run_dir) == ["sft", "rl", "branch", "mopd", "branch", "mopd"]
    assert (run_dir / "superseded" / "01-from-branch" / "checkpoints" / "stage-03-mopd").is_dir()
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_export(undisturbed, run_dir)


@pytest.mark.slow
def test_a_torn_ledger_is_mended_and_what_it_lost_is_measured_again(world, undisturbed):
    recipe, run_dir = cascade(world, "torn")
    assert run(recipe, "--until", "branch") == 0, output(recipe)
    ledger = run_dir / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    position = next(n for n, line in enumerate(lines) if json.loads(line).get("after") == "sft")
    ledger.write_bytes(b"".join(lines[:position]) + lines[position][:40])
    assert run(recipe) == 0, output(recipe)
    assert (run_dir / "ledger.jsonl.damaged-1").exists()
    assert {"start", "sft", "rl", "branch", "mopd"} <= set(Ledger(run_dir).scores())
    assert_same_export(undisturbed, run_dir)
