"""One of two ranks of the emulation's tests: `fp8_worker.py FOLDER`; rank 0 writes FOLDER/found.pt.

FOLDER holds the checkpoints qwen3/, qwen3_moe/, deepseek_v3/ and nemotron_h/.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layout_data import example_batch, negative_log_likelihood
from running_policy import copied, cpu_trainer, running_policy

from millrace.config.schema import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
)
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.policy import Policy
from millrace.megatron.precision import PLAIN

TP2, DP2 = ParallelConfig(tp=2, sequence_parallel=True), ParallelConfig(dp=2)
LAYOUTS = {"tp2": TP2, "dp2": DP2, "pp2": ParallelConfig(pp=2), "tp2 without sp": ParallelConfig(tp=2)}
DELAYED = PrecisionConfig(fp8="delayed", amax_history=3, emulate=True)
RECIPES = {
    "none": PLAIN,
    "delayed": DELAYED,
    **{fp8: PrecisionConfig(fp8=fp8, emulate=True) for fp8 in ("tensorwise", "blockwise", "mxfp8")},
}
FAMILIES = {"qwen3": TP2, "qwen3_moe": ParallelConfig(dp=2, ep=2), "deepseek_v3": TP2, "nemotron_h": TP2}


@contextmanager
def policy_of(
    folder: Path,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    family: str = "qwen3",
    recompute: str = "none",
    lora: LoraConfig | None = None,
) -> Iterator[Policy]:
    model = ModelConfig(path=str(folder / family), dtype="float32", lora=lora)
    trainer, optimizer = cpu_trainer(recompute=recompute), OptimizerConfig(lr=1e-3)
    with running_policy(model, parallel, trainer, optimizer=optimizer, precision=precision) as policy:
        policy.load_hf(model.path)
        yield policy


def losses(policy: Policy, steps: int) -> list[float]:
    return [policy.train_step(example_batch(), negative_log_likelihood)["loss"] for _ in range(steps)]


def resumed(folder: Path) -> dict[str, Any]:
    """Four steps at once, and two and two with a checkpoint between."""
    found: dict[str, Any] = {}
    checkpoints = Checkpointer(folder / "checkpoints", keep=1)
    with policy_of(folder, TP2, DELAYED) as policy:
        losses(policy, 2)
        checkpoint = checkpoints.save(policy, 2, {})
        found["at once"] = losses(policy, 2), copied(policy.hf_tensors()), policy.emulation.history.state()
    with policy_of(folder, TP2, DELAYED) as policy:
        checkpoints.load(policy, checkpoint)
        found["resumed"] = losses(policy, 2), copied(policy.hf_tensors()), policy.emulation.history.state()
    with policy_of(folder, TP2, DELAYED) as policy:
        checkpoints.load(policy, checkpoint)
        policy.emulation.history.reset()
        found["without its history"] = losses(policy, 2), copied(policy.hf_tensors()), policy.emulation.history.state()
    with policy_of(folder, DP2, DELAYED) as policy:
        checkpoints.load(policy, checkpoint)
        found["at another layout"] = losses(policy, 2), {}, policy.emulation.history.state()
    return found


def computed_again(folder: Path) -> dict[str, Any]:
    found = {}
    for recompute in ("none", "full"):
        with policy_of(folder, DP2, DELAYED, recompute=recompute) as policy:
            found[recompute] = losses(policy, 3), copied(policy.hf_tensors())
    return found


def traces(folder: Path) -> dict[str, Any]:
    """What log-prob passes leave in the history, and what a new stage finds there."""
    with policy_of(folder, DP2, DELAYED) as policy:
        losses(policy, 1)
        history = policy.emulation.history
        before = history.state()["values"].clone()
        policy.logprobs(example_batch())
        found = {"before": before, "after": history.values.clone(), "seen": history.seen.clone()}
        policy.reset_optimizer(OptimizerConfig(), total_steps=1)
        return found | {"new stage": (history.values.clone(), history.scales.clone())}


def covered(folder: Path) -> dict[str, Any]:
    """Which matrices of each family's layers are emulated, and all that there are."""
    found: dict[str, Any] = {}
    for family, parallel in FAMILIES.items():
        with policy_of(folder, parallel, DELAYED, family=family) as policy:
            found[family] = {
                "loss": losses(policy, 1),
                "emulated": policy.emulation.history.names,
                "matrices": _everywhere(_matrices(policy)),
            }
    for name, edges in (("first", {"first_layers_bf16": 1}), ("last", {"last_layers_bf16": 2})):
        with policy_of(folder, DP2, PrecisionConfig(fp8="mxfp8", emulate=True, **edges)) as policy:
            found[name] = policy.emulation.count
    return found


def _matrices(policy: Policy) -> list[str]:
    from millrace.megatron.weights import CanonicalNames

    names = CanonicalNames(policy.shape, policy.topology)
    return [
        names(name)
        for name, p in policy.module.named_parameters()
        if p.dim() == 2 and name.startswith("decoder.layers")
    ]


def _everywhere(own: list[str]) -> list[str]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return sorted({name for names in gathered for name in names})


def main(folder: Path) -> None:
    found: dict[str, Any] = {"layouts": {}, "recipes": {}, "lora": {}}
    for name, parallel in LAYOUTS.items():
        with policy_of(folder, parallel, DELAYED) as policy:
            found["layouts"][name] = losses(policy, 3), policy.emulation.history.state()
    for name, precision in RECIPES.items():
        with policy_of(folder, DP2, precision) as policy:
            logp, _ = policy.logprobs(example_batch())
            found["recipes"][name] = logp, losses(policy, 3)
    for name in ("none", "tensorwise"):
        with policy_of(folder, TP2, RECIPES[name], lora=LoraConfig(rank=4)) as policy:
            found["lora"][name] = losses(policy, 3)
    found |= {"resume": resumed(folder), "recompute": computed_again(folder), "traces": traces(folder)}
    found["covered"] = covered(folder)
    if os.environ["RANK"] == "0":
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
