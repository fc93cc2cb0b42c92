"""One rank of a trainer that gives a live engine the weights of a checkpoint; rank 0 writes what came of it.

Usage: sync_worker.py STARTED_WITH GIVEN FOLDER LAYOUT.json; rank N writes FOLDER/N.json, rank 0 FOLDER/engine.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from millrace.config.model_shape import ModelShape
from millrace.config.schema import FleetConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from millrace.data.batch import TokenBatch
from millrace.megatron.policy import Policy
from millrace.megatron.topology import init_distributed
from millrace.rollout import weight_sync
from millrace.rollout.fleet import Fleet
from millrace.rollout.weight_sync import WeightSync

TRANSPORTS = ("shared_memory", "disk", "gloo")
PROMPTS = tuple(tuple((7 * n + 5 * i) % 300 for i in range(20)) for n in range(4))
CONFIG = FleetConfig(
    dtype="float32",
    tensor_parallel=2,
    max_model_len=256,
    max_num_seqs=8,
    kv_cache_bytes=32 << 20,
    bucket_bytes=64 << 10,
    request_timeout_s=60,
    probe_tolerance=1e-4,
)


class OneRank:
    """A trainer of one rank: sends every tensor of a checkpoint's file as it stands there."""

    def __init__(self, checkpoint: str, probe: Tensor) -> None:
        self._file, self._probe = Path(checkpoint) / "model.safetensors", probe

    def hf_tensors(self, *, few_owners: bool = False) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self._file, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)

    def owned_bytes(self, *, few_owners: bool = False) -> int:
        return sum(tensor.nbytes for _, tensor in self.hf_tensors())

    def logprobs(self, batch: TokenBatch, *, temperature: float = 1.0) -> tuple[Tensor, None]:
        return self._probe, None


def peak_bytes(policy: Policy, few_owners: bool) -> dict[str, int]:
    """What this rank exports, and the most memory that it takes for that at one time."""
    owned = largest = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _, tensor in policy.hf_tensors(few_owners=few_owners):
            owned, largest = owned + tensor.nbytes, max(largest, tensor.nbytes)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return {"owned": owned, "largest": largest, "peak": peak, "planned": policy.owned_bytes(few_owners=few_owners)}


class Listening(WeightSync):
    """Keeps what every rank said that it sent."""

    def _conclude(self, fleet, version, sent, expected):  # type: ignore[no-untyped-def]
        self.sent = sent
        return super()._conclude(fleet, version, sent, expected)


def main(started_with: str, given: str, folder: Path, layout: str) -> None:
    weight_sync.SAMPLE_PERIOD = 1  # every tensor's fingerprint is compared in every sync
    parallel = ParallelConfig(**json.loads(Path(layout).read_text()))
    trainer = TrainerConfig(device="cpu", threads_per_rank=1, collective_timeout_s=240)
    topology = init_distributed(parallel, trainer, seed=1)
    main_rank = topology.rank == 0
    with Fleet(CONFIG, started_with, folder) if main_rank else nullcontext() as fleet:
        policy = Policy(
            ModelConfig(path=given, dtype="float32"),
            ModelShape.from_hf(given),
            parallel,
            trainer,
            topology,
            optimizer=OptimizerConfig(),
            seed=1,
        )
        policy.load_hf(given)
        found = {f"few_owners={few}": peak_bytes(policy, few) for few in (False, True)}
        (folder / f"{topology.rank}.json").write_text(json.dumps(found))
        if fleet:
            fleet.wait_ready()
        told: dict[str, Any] = {}
        for version, transport in enumerate(TRANSPORTS, start=1):
            sync = Listening(policy, fleet, replace(CONFIG, transport=transport), topology)
            told[transport] = pushed(sync, version, fleet)
        probe = policy.logprobs(TokenBatch.from_sequences([weight_sync.PROBE_TOKENS]))[0]
        if fleet:
            alone = Listening(OneRank(given, probe), fleet, CONFIG, SimpleNamespace(rank=0, world=1))
            told["one rank"] = pushed(alone, 9, fleet)
            (folder / "engine.json").write_text(json.dumps(told))
        dist.barrier()
    topology.close()


def pushed(sync: Listening, version: int, fleet: Fleet | None) -> dict[str, Any]:
    """Push, and what the engine then makes of some prompts. Collective."""
    report = sync.push(version)
    if fleet is None:
        return {}
    return {
        "fingerprints": {name: value for rank in sync.sent for name, value in rank.fingerprints.items()},
        "bytes": [rank.bytes for rank in sync.sent],
        "compared": report.fingerprints,
        "held": report.held,
        "logprobs": fleet.prompt_logprobs(PROMPTS),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
