"""Real runs of `millrace run` for the end-to-end tests: recipes, data, starting, waiting, killing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import yaml
from safetensors.torch import load_file
from tiny_checkpoints import write_checkpoint

LIMIT = 240.0
"""Seconds after which a run of these sizes hangs."""


def write_world(folder: Path) -> Path:
    """A tiny base model and data sets; returns the folder."""
    write_checkpoint("qwen3", folder / "base", seed=1)
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    conversations = [
        [{"role": "user", "content": f"say {a} {b}"}, {"role": "assistant", "content": f"{a}, {b}."}]
        for a in words
        for b in words
    ]
    write_rows(folder / "sft.jsonl", [{"messages": messages} for messages in conversations])
    prompts = [
        {"prompt": f"say {word} ({i})", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for i, word in enumerate(words)
    ]
    write_rows(folder / "train.jsonl", prompts)
    write_rows(folder / "held_out.jsonl", [{**row, "prompt": row["prompt"] + "!"} for row in prompts[:4]])
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_recipe(world: Path, name: str, *, stages: list[dict], domains: bool | dict, **keys) -> Path:
    """`domains` are the recipe's, or whether it has the one of `write_world`."""
    recipe = {
        "name": name,
        "run_dir": str(world / "runs" / name),
        "seed": 5,
        "model": {"path": "base", "dtype": "float32"},
        "parallel": {"tp": 2, "sequence_parallel": True},
        "trainer": {"device": "cpu", "max_tokens_per_micro_batch": 512, "threads_per_rank": 1},
        "checkpoint": {"every": 2, "keep": 2},
        "stages": stages,
        **keys,
    }
    if domains:
        files = {"train": "train.jsonl", "held_out": "held_out.jsonl"}
        plain = {"if": {"environment": "instruction_following", **files}}
        fleet = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "kv_cache_bytes": 67108864}
        evaluation = {"every": 2, "samples": 2, "sampling": {"max_response_tokens": 8}}
        recipe["domains"] = plain if domains is True else domains
        recipe |= {"fleet": fleet, "evaluation": evaluation} | keys
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


SFT = {"type": "sft", "name": "sft", "data": ["sft.jsonl"], "steps": 4, "global_batch": 8, "max_length": 256}
RL = {
    "type": "rl",
    "name": "rl",
    "domains": ["if"],
    "steps": 4,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "updates_per_batch": 2,
    "dynamic_sampling": True,
    "loss": {"kind": "ppo", "clip_high": 0.28},
    "off_policy": {"kind": "tis"},
    "kl": {"coefficient": 0.1},
    "sampling": {"max_response_tokens": 150},
    "optimizer": {"lr": 1.0e-3},
}


def start(recipe: Path, *arguments: str, command: Sequence[str] = ("run",)) -> subprocess.Popen:
    """Start a command of millrace on a recipe; what it says goes to the recipe's log."""
    command = [sys.executable, "-m", "millrace.cli", *command, str(recipe), *arguments]
    log = recipe.with_suffix(".log").open("a", encoding="utf-8")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=recipe.parent)


def output(recipe: Path) -> str:
    return recipe.with_suffix(".log").read_text(encoding="utf-8")


def finish(process: subprocess.Popen, recipe: Path) -> int:
    """Wait for the end of a run and return its status; a run that hangs is killed and fails the test."""
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"the run did not end within {LIMIT:g} s:\n{output(recipe)}") from None


def run(recipe: Path, *overrides: str) -> int:
    return finish(start(recipe, *overrides), recipe)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, recipe: Path) -> bool:
    """Wait for a condition of the run's folder; False when the run ended before."""
    end = time.monotonic() + LIMIT
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            kill(process)
            raise AssertionError(f"waited {LIMIT:g} s in vain:\n{output(recipe)}")
        time.sleep(0.01)
    return True


def kill(process: subprocess.Popen) -> None:
    """kill -9 the launcher and all that it started, at once and in no order."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(tree, timeout=20)


def exported(run_dir: Path) -> dict:
    tensors = {}
    for file in sorted((run_dir / "export").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
