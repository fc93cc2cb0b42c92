"""What each FP8 recipe does to SFT and to log-probs, by the emulation: the laptop's dense model, from the same weights
through the same batches in float32, in bfloat16, and in bfloat16 with FP8 products.

    gap        mean loss of the last 20 steps over that of bfloat16
    mismatch   mean |log-prob difference| of the trained tokens of one batch between the trained policy and the same
               weights without FP8: what an engine in bfloat16 would differ by

Each is taken for several orders of the data, of which the mean and the extremes are said. An emulation says nothing
about speed.

    python -m benchmarks.fp8_emulation [--steps 250] [--seeds 3] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.setting import say
from millrace.algorithms.losses import sft_loss_fn
from millrace.config.model_shape import ModelShape
from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig, TrainerConfig
from millrace.data.datasets import ConversationDataset
from millrace.data.sampler import EpochSampler
from millrace.data.tokenizer import ChatTokenizer
from millrace.megatron.policy import Policy
from millrace.megatron.precision import PLAIN
from millrace.megatron.topology import Topology, init_distributed
from millrace.stages.sft import sft_batch

MAKE_DATA = Path(__file__).resolve().parents[1] / "recipes" / "laptop" / "make_data.py"
OPTIMIZER = OptimizerConfig(lr=3e-3, schedule="cosine", min_lr=3e-4, warmup_steps=20)
GLOBAL_BATCH, MAX_LENGTH, LAST = 64, 96, 20

RUNS: dict[str, tuple[str, PrecisionConfig]] = {
    "float32": ("float32", PLAIN),
    "bfloat16": ("bfloat16", PLAIN),
    "delayed": ("bfloat16", PrecisionConfig(fp8="delayed", emulate=True)),
    "delayed, history 16, most_recent": (
        "bfloat16",
        PrecisionConfig(fp8="delayed", amax_history=16, amax_algorithm="most_recent", emulate=True),
    ),
    "tensorwise": ("bfloat16", PrecisionConfig(fp8="tensorwise", emulate=True)),
    "blockwise": ("bfloat16", PrecisionConfig(fp8="blockwise", emulate=True)),
    "blockwise, float32 scales": (
        "bfloat16",
        PrecisionConfig(fp8="blockwise", power_of_two_scales=False, emulate=True),
    ),
    "mxfp8": ("bfloat16", PrecisionConfig(fp8="mxfp8", emulate=True)),
}
"""Data type and precision of each run."""


class Setting:
    """The model and the data that all runs share."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.base, self.steps = folder / "base", steps
        self.shape = ModelShape.from_hf(self.base)
        tokenizer = ChatTokenizer(str(self.base), self.shape.vocab_size, None)
        self.data = ConversationDataset((str(folder / "sft.jsonl"),), tokenizer, max_length=MAX_LENGTH)
        self.trainer = TrainerConfig(device="cpu", threads_per_rank=torch.get_num_threads())
        self.topology: Topology = init_distributed(ParallelConfig(), self.trainer, seed=1)

    def policy(self, dtype: str, precision: PrecisionConfig) -> Policy:
        policy = Policy(
            ModelConfig(path=str(self.base), dtype="float32" if dtype == "float32" else "bfloat16"),
            self.shape,
            ParallelConfig(),
            self.trainer,
            self.topology,
            optimizer=OPTIMIZER,
            seed=1,
            precision=precision,
        )
        policy.load_hf(str(self.base))
        policy.reset_optimizer(OPTIMIZER, total_steps=self.steps)
        return policy

    def run(self, dtype: str, precision: PrecisionConfig, seed: int) -> dict[str, Any]:
        """Losses of each step, the mismatch at the end and the seconds."""
        policy, sampler = self.policy(dtype, precision), EpochSampler(len(self.data), seed=seed)
        start = time.perf_counter()
        losses = []
        for _ in range(self.steps):
            batch = sft_batch(self.data, sampler.next(GLOBAL_BATCH))
            losses.append(policy.train_step(batch, sft_loss_fn())["loss"])
        seconds = time.perf_counter() - start
        return {"losses": losses, "mismatch": self.mismatch(policy, dtype), "seconds": seconds}

    def mismatch(self, policy: Policy, dtype: str) -> float:
        """Against the same weights without FP8, on the first rows of the data."""
        batch = sft_batch(self.data, list(range(4 * GLOBAL_BATCH)))
        exact = self.policy(dtype, PLAIN)
        with torch.no_grad():
            theirs = dict(policy.module.named_parameters())
            for name, parameter in exact.module.named_parameters():
                parameter.copy_(theirs[name])
        difference = policy.logprobs(batch)[0] - exact.logprobs(batch)[0]
        return float(difference[batch.streams["weight"] != 0].abs().mean())


def main(arguments: argparse.Namespace) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29877")
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(MAKE_DATA), "--out", folder], check=True, stderr=subprocess.DEVNULL)
        setting = Setting(Path(folder), arguments.steps)
        found: dict[str, list[dict[str, Any]]] = {}
        for name in arguments.runs or RUNS:
            found[name] = [setting.run(*RUNS[name], seed) for seed in range(1, arguments.seeds + 1)]
            say(f"{name}: {fmean(one['seconds'] for one in found[name]):.0f} s a run")
        setting.topology.close()
    say(table(found, arguments.steps))
    if arguments.out is not None:
        about = {"steps": arguments.steps, "seeds": arguments.seeds, "torch": torch.__version__}
        arguments.out.write_text(json.dumps({**about, "runs": found}, indent=1) + "\n", encoding="utf-8")


def table(found: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """Loss of each run along the way, gap and mismatch, as a Markdown table."""
    shown = [step for step in (1, 25, 50, 100, 150, 200) if step <= steps]
    titles = ["run", *(f"step {step}" for step in shown), f"last {LAST}", "gap to bfloat16", "mismatch"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, runs in found.items():
        along = [fmean(run["losses"][step - 1] for run in runs) for step in shown]
        ends = [end_of(run) for run in runs]
        gaps = [end - end_of(plain) for end, plain in zip(ends, found.get("bfloat16", []), strict=False)]
        gap = f"{fmean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})" if gaps and name != "bfloat16" else "-"
        mismatch = f"{fmean(run['mismatch'] for run in runs):.4f}"
        lines.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in [*along, fmean(ends)])} | {gap} | {mismatch} |")
    return "\n".join(lines)


def end_of(run: dict[str, Any]) -> float:
    """Mean loss of the last steps."""
    return fmean(run["losses"][-LAST:])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.fp8_emulation", description="SFT with emulated FP8")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3, help="orders of the data")
    parser.add_argument("--runs", nargs="*", choices=RUNS, help="only these")
    parser.add_argument("--out", type=Path, help="JSON file for every loss")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
