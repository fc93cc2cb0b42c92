"""One rank of the checkpoint tests: `checkpoint_worker.py PHASE FOLDER`; rank 0 writes FOLDER/PHASE.json."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from running_policy import cpu_trainer, running_policy
from torch import Tensor

from millrace.checkpoint_store import CheckpointError, CheckpointStore
from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from millrace.converters.fingerprint import fingerprint
from millrace.data.batch import TokenBatch
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.policy import Policy
from millrace.megatron.sharded_state import check_metadata
from millrace.ports import free_port

LAYOUTS = {
    "tp2_sp": ("qwen3", "float32", ParallelConfig(tp=2, sequence_parallel=True), False),
    "dp2_distributed": ("tied", "bfloat16", ParallelConfig(dp=2), True),
    "moe_ep2": ("qwen3_moe", "float32", ParallelConfig(dp=2, ep=2), False),
    "hybrid_tp2_ep2": ("hybrid", "float32", ParallelConfig(tp=2, ep=2, sequence_parallel=True), False),
    "hybrid_distributed": ("hybrid", "bfloat16", ParallelConfig(dp=2, ep=2), True),
    "cp2_distributed": ("qwen3", "float32", ParallelConfig(cp=2), True),
    "sandwich_pp2": ("gemma3_text", "float32", ParallelConfig(pp=2), False),
    "latent_tp2": ("deepseek_v3", "float32", ParallelConfig(tp=2, etp=2, sequence_parallel=True), True),
}
"""Base model (a folder), data type, layout, distributed optimizer of each run that is saved."""

OPTIMIZER = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=2, decay_steps=8, weight_decay=0.1)
STEPS, SAVED_AT = 6, 3
PROBE = torch.arange(24).reshape(2, 12) * 7 % 256


def running(
    folder: Path, base: str, dtype: str, parallel: ParallelConfig, distributed: bool, *, forward_only: bool = False
) -> AbstractContextManager[Policy]:
    model = ModelConfig(path=str(folder / base), dtype=dtype)
    trainer = cpu_trainer(max_tokens_per_micro_batch=64, distributed_optimizer=distributed)
    return running_policy(model, parallel, trainer, optimizer=None if forward_only else OPTIMIZER, seed=7)


def batch_of(step: int) -> TokenBatch:
    """Six sequences of unequal length that depend on the step, and on torch's random state."""
    drawn = torch.Generator().manual_seed(step)
    sequences = [torch.randint(0, 256, (9 + 3 * i,), generator=drawn).tolist() for i in range(6)]
    weights = [[0.0] + [1.0 / 100] * (len(s) - 1) for s in sequences]
    return TokenBatch.from_sequences(sequences, {"weight": weights})


def negative_log_likelihood(logp: Tensor, streams: Any, segment_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return -(streams["weight"] * logp).sum(), {}


def train(policy: Policy, steps: range) -> list[float]:
    losses = []
    for step in steps:
        noise = 1.0 + 0.1 * float(torch.rand(()))  # a draw that a resume must repeat, or the weights differ
        torch.distributed.broadcast(drawn := torch.tensor(noise), src=0)
        batch = batch_of(step)
        batch = batch.with_streams(weight=batch.streams["weight"] * drawn)
        losses.append(policy.train_step(batch, negative_log_likelihood)["loss"])
    return losses


def outcome(policy: Policy, losses: list[float]) -> dict[str, Any]:
    """Losses, and fingerprints of every rank's weights, optimizer moments and next random number."""
    moments = [
        fingerprint(value)
        for part in policy.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for _, value in sorted(state.items())
        if isinstance(value, Tensor)
    ]
    own = {
        "weights": [fingerprint(p.detach()) for p in policy.module.parameters()],
        "moments": moments,
        "random": float(torch.rand(())),
        "lr": [group["lr"] for group in policy.optimizer.param_groups],
    }
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    return {"losses": losses, "ranks": of_ranks, "step": policy.step}


def straight(folder: Path) -> dict[str, Any]:
    """Six steps without stopping, saved after three."""
    results = {}
    for name, layout in LAYOUTS.items():
        with running(folder, *layout) as policy:
            policy.load_hf(policy.config.path)
            policy.set_schedule(OPTIMIZER, STEPS)
            losses = train(policy, range(SAVED_AT))
            Checkpointer(folder / "ckpt" / name, keep=2).save(policy, SAVED_AT, {"sampler": {"position": SAVED_AT}})
            logits = policy.logits(PROBE).tolist()
            losses += train(policy, range(SAVED_AT, STEPS))
            results[name] = {**outcome(policy, losses[SAVED_AT:]), "logits": logits}
    return results


def resumed(folder: Path) -> dict[str, Any]:
    """The last three steps, in new processes, from the checkpoint; and pipelines of two from other layouts."""
    results = {}
    for name, layout in LAYOUTS.items():
        with running(folder, *layout) as policy:
            state = Checkpointer(folder / "ckpt" / name, keep=2).load(policy)
            policy.set_schedule(OPTIMIZER, STEPS, done=policy.step)
            results[name] = {**outcome(policy, train(policy, range(SAVED_AT, STEPS))), "state": state}
    results["pp2_from_tp2"] = elsewhere(folder, "tp2_sp", ParallelConfig(pp=2), False)
    results["pp2_from_hybrid"] = elsewhere(folder, "hybrid_tp2_ep2", ParallelConfig(pp=2), True)
    results["pp2_from_dp2"] = elsewhere(folder, "dp2_distributed", ParallelConfig(pp=2), True)
    return results


def elsewhere(folder: Path, name: str, parallel: ParallelConfig, distributed: bool) -> dict[str, Any]:
    """Load the run `name` at another layout: its logits, and the loss of the next two steps."""
    base, dtype, _, _ = LAYOUTS[name]
    with running(folder, base, dtype, parallel, distributed) as policy:
        Checkpointer(folder / "ckpt" / name, keep=2).load(policy)
        logits = policy.logits(PROBE).tolist()
        policy.set_schedule(OPTIMIZER, STEPS, done=policy.step)
        return {"logits": logits, "losses": train(policy, range(SAVED_AT, SAVED_AT + 2))}


def single(folder: Path) -> dict[str, Any]:
    """On one rank: every run loaded, a reference loaded, damage, and a full disk."""
    results: dict[str, Any] = {
        "one_from_tp2": elsewhere(folder, "tp2_sp", ParallelConfig(), True),
        "one_from_dp2": elsewhere(folder, "dp2_distributed", ParallelConfig(), False),
        "one_from_hybrid": elsewhere(folder, "hybrid_tp2_ep2", ParallelConfig(), False),
        "one_from_ep2": elsewhere(folder, "moe_ep2", ParallelConfig(), False),
        "one_from_latent": elsewhere(folder, "latent_tp2", ParallelConfig(), False),
        "one_from_sandwich": elsewhere(folder, "sandwich_pp2", ParallelConfig(), False),
    }
    layout = ("qwen3", "float32", ParallelConfig(), False)
    with running(folder, *layout, forward_only=True) as reference:
        before = torch.get_rng_state()
        Checkpointer(folder / "elsewhere", 1).load(reference, folder / "ckpt" / "tp2_sp" / f"step-{SAVED_AT:08d}")
        results["reference"] = {
            "logits": reference.logits(PROBE).tolist(),
            "random_kept": bool(torch.equal(before, torch.get_rng_state())),
        }
    with running(folder, *layout) as policy:
        train(policy, range(1))
        results |= damage(folder, policy)
        results["other_model"] = refusal(lambda: Checkpointer(folder / "ckpt" / "moe_ep2", 2).load(policy))
        results["full_disk"] = full_disk(folder, policy)
    results["hostile"] = hostile_metadata(folder)
    return results


def refusal(work: Callable[[], Any]) -> str | None:
    """What a CheckpointError says, or None when nothing was refused."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


def damage(folder: Path, policy: Policy) -> dict[str, Any]:
    results = {}
    for kind in ("altered", "truncated"):
        damaged = folder / kind
        Checkpointer(damaged, 3).save(policy, 1, {})
        Checkpointer(damaged, 3).save(policy, 2, {})
        file = damaged / "step-00000002" / "shards" / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if kind == "altered" else content[:-1])
        results[kind] = refusal(lambda at=damaged: Checkpointer(at, 3).load(policy))
        (damaged / "latest").write_text("step-00000001\n")
        results[f"{kind}_older"] = Checkpointer(damaged, 3).load(policy)
    return results


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hostile-code-ran",)


def hostile_metadata(folder: Path) -> str | None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    return refusal(lambda: check_metadata(folder))


class ShortSighted(CheckpointStore):
    """Looks for space only after a failure: as when another program takes it right after the check."""

    def require_space(self, needed: int, aside: Path | None = None) -> None:
        if aside is not None:
            super().require_space(needed, aside)


def full_disk(folder: Path, policy: Policy) -> dict[str, Any]:
    """A checkpoint fits once into a small file system, and not twice."""
    disk = folder / "small_disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        return {"skipped": mounted.stderr.decode()}
    try:
        checkpointer = Checkpointer(disk / "ckpt", 2)
        checkpointer.save(policy, 1, {"good": True})
        (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 20)))
        results: dict[str, Any] = {"foreseen": refusal(lambda: checkpointer.save(policy, 2, {}))}
        checkpointer.store = ShortSighted(disk / "ckpt", 2)
        results["written_into"] = refusal(lambda: checkpointer.save(policy, 2, {}))
        os.truncate(disk / "others", (disk / "others").stat().st_size - (3 << 19))
        results["during_shards"] = refusal(lambda: checkpointer.save(policy, 2, {}))
        results["left"] = sorted(path.name for path in (disk / "ckpt").iterdir())
        results["still_loads"] = Checkpointer(disk / "ckpt", 2).load(policy)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return results


def save_for_ever(folder: Path) -> None:
    """Load what there is, say which, and save one step after the other until killed."""
    with running(folder, "tiny", "float32", ParallelConfig(), False) as policy:
        checkpointer = Checkpointer(folder / "killed", keep=2)
        state = checkpointer.load(policy)
        step = state["step"] if state else 0
        weights = [fingerprint(p.detach()) for p in policy.module.parameters()]
        sys.stdout.write(json.dumps({"loaded": state, "step": policy.step, "weights": weights}) + "\n")
        sys.stdout.flush()
        while True:
            step += 1
            policy.step = step
            with torch.no_grad():
                for p in policy.module.parameters():
                    p.add_(1.0)
            weights = [fingerprint(p.detach()) for p in policy.module.parameters()]
            checkpointer.save(policy, step, {"step": step, "weights": weights})


def kills(folder: Path) -> dict[str, Any]:
    """Kill a saving process ten times at random moments; each next one loads what it finds. Forked, to start fast."""
    rounds = []
    for _ in range(10):
        os.environ["MASTER_PORT"] = str(free_port())
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, sys.stdout.fileno())
            save_for_ever(folder)
        os.close(writing)
        with os.fdopen(reading) as says:
            found = json.loads(says.readline())
            time.sleep(random.uniform(0.0, 0.5))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = sorted(path.name for path in (folder / "killed").glob(".*"))
        rounds.append({**found, "left": left})
    return {"rounds": rounds}


PHASES = {"kills": kills, "straight": straight, "resumed": resumed, "single": single}

if __name__ == "__main__":
    phase, where = sys.argv[1], Path(sys.argv[2])
    found = PHASES[phase](where)
    if os.environ["RANK"] == "0":
        (where / f"{phase}.json").write_text(json.dumps(found))
