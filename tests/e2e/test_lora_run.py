"""A run that trains adapters: SFT, RL and distillation through real engines, its exports, and the commands for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_runs import RL, SFT, exported, output, run, write_recipe, write_world
from safetensors.torch import load_file

from millrace.cascade.ledger import Ledger

LORA = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}
STAGES = [
    {**SFT, "steps": 3, "optimizer": {"lr": 1.0e-3}},
    {**RL, "steps": 2},
    {
        "type": "mopd",
        "name": "mopd",
        "teachers": {"if": "stage(sft)"},
        "steps": 1,
        "prompts_per_step": 4,
        "sampling": {"max_response_tokens": 32},
        "optimizer": {"lr": 1.0e-3},
    },
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run_dir(world: Path, standing_engine: dict) -> Path:
    """The run, stopped behind its first stage and resumed."""
    model = {"path": "base", "dtype": "float32", "lora": LORA}
    # Merged weights and adapters beside the base differ by rounding alone, or the sync refuses them.
    recipe = write_recipe(world, "adapted", stages=STAGES, domains=True, model=model, fleet=standing_engine)
    tight = "fleet.probe_tolerance=1e-4"
    assert run(recipe, tight, "--until", "sft") == 0, output(recipe)
    assert run(recipe, tight) == 0, output(recipe)
    return world / "runs" / "adapted"


def millrace(*arguments: str) -> str:
    command = [sys.executable, "-m", "millrace.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_stage_ran_and_the_export_is_the_base_with_the_adapter(run_dir: Path, world: Path) -> None:
    finished = [event["stage"] for event in Ledger(run_dir).events() if event["event"] == "stage_finished"]
    assert finished == ["sft", "rl", "mopd"]
    base, merged = load_file(world / "base" / "model.safetensors"), exported(run_dir)
    adapter = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" not in adapter:
            assert torch.equal(merged[name], weight), name
            continue
        delta = 2.0 * adapter[f"{stem}B.weight"].double() @ adapter[f"{stem}A.weight"].double()
        assert delta.abs().max() > 0, name
        torch.testing.assert_close(merged[name].double(), weight.double() + delta, atol=2e-7, rtol=2e-7)


def test_the_last_checkpoint_gives_the_same_adapter_and_merging_it_the_export(run_dir: Path, world: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "stage-02-mopd"
    adapter, merged = world / "adapter", world / "merged"
    millrace("convert", "adapter", "--checkpoint", str(checkpoint), "--out", str(adapter))
    mine, theirs = (load_file(at / "adapter_model.safetensors") for at in (adapter, run_dir / "adapter"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert json.loads((adapter / "adapter_config.json").read_text())["target_modules"] == sorted(LORA["targets"])
    millrace("convert", "merge", "--hf", str(world / "base"), "--adapter", str(adapter), "--out", str(merged))
    again = {name: tensor for file in merged.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in exported(run_dir).items():
        torch.testing.assert_close(again[name], tensor, atol=1e-7, rtol=1e-6)


def test_a_checkpoint_of_adapters_is_no_whole_model(run_dir: Path, world: Path) -> None:
    command = [sys.executable, "-m", "millrace.cli", "convert", "megatron-to-hf"]
    command += ["--checkpoint", str(run_dir / "checkpoints" / "stage-02-mopd"), "--out", str(world / "whole")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode != 0 and "millrace convert adapter" in done.stdout + done.stderr
