"""One rank of the memory test: builds each case's policy, trains one step and writes how many bytes it held.

Usage: memory_worker.py CASES.json FOLDER; every rank writes FOLDER/CASE-RANK.json for each case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from layout_data import VOCABULARY, negative_log_likelihood
from running_policy import cpu_trainer, running_policy
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from millrace.data.batch import TokenBatch
from millrace.megatron.policy import Policy

SEQUENCES = 4
"""Sequences of one micro-batch, all equally long."""


class SavedTensors:
    """The most bytes that autograd holds at one time: distinct storages, those of parameters left out."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._left_out = {p.untyped_storage().data_ptr() for p in parameters}
        self._holders: dict[int, int] = {}
        self.bytes = self.peak = 0

    def pack(self, tensor: Tensor) -> _Held | Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._left_out or not storage.nbytes():
            return tensor
        return _Held(self, tensor)

    def unpack(self, held: _Held | Tensor) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def count(self, storage: torch.UntypedStorage, holders: int) -> None:
        """A storage has one holder more, or one less."""
        key = storage.data_ptr()
        before = self._holders.get(key, 0)
        self._holders[key] = before + holders
        if before == 0:
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
        elif before + holders == 0:
            self.bytes -= storage.nbytes()


class _Held:
    """A tensor as long as autograd keeps it."""

    def __init__(self, meter: SavedTensors, tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor
        meter.count(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.meter.count(self.tensor.untyped_storage(), -1)


def main(cases: list[dict[str, Any]], folder: Path) -> None:
    for case in cases:
        with running_policy(
            ModelConfig(path=case["model"], dtype=case["dtype"]),
            ParallelConfig(**case["parallel"]),
            cpu_trainer(max_tokens_per_micro_batch=case["tokens"], **case["trainer"]),
            optimizer=OptimizerConfig(lr=1e-3),
            port=case["port"],
        ) as policy:
            found = measured(policy, case)
            (folder / f"{case['name']}-{policy.topology.rank}.json").write_text(json.dumps(found))
        del policy


def measured(policy: Policy, case: dict[str, Any]) -> dict[str, int]:
    if policy.shape.num_experts:
        # Routing of random weights is lopsided; a plan says what balanced experts need.
        policy.module.config.moe_router_force_load_balancing = True
    parameters = list(policy.module.parameters())
    meter = SavedTensors(parameters)
    cut = policy.cut(full_batch(case["tokens"], case["micro_batches"] * policy.parallel.dp))
    assert len(cut) == case["micro_batches"]
    with saved_tensors_hooks(meter.pack, meter.unpack):
        policy.backward(cut, negative_log_likelihood)
    assert meter.bytes == 0, "autograd still holds tensors behind the backward pass"
    policy.optimizer.step()
    return {
        "weights": nbytes(parameters),
        "gradients": nbytes(p.main_grad for p in parameters if p.requires_grad),
        "optimizer": optimizer_bytes(policy),
        "activations": meter.peak,
    }


def full_batch(tokens: int, micro_batches: int) -> TokenBatch:
    """As many sequences as fill these micro-batches to the last token, all with a weight."""
    generator = torch.Generator().manual_seed(5)
    length = tokens // SEQUENCES
    rows = torch.randint(0, VOCABULARY, (SEQUENCES * micro_batches, length), generator=generator).tolist()
    return TokenBatch.from_sequences(rows).with_streams(weight=torch.ones(length * len(rows)))


def optimizer_bytes(policy: Policy) -> int:
    """Moments, and the float32 copies of parameters that are not float32 themselves."""
    total = 0
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                total += sum(nbytes([value]) for value in inner.state[parameter].values() if torch.is_tensor(value))
                total += nbytes([parameter]) if policy.dtype != torch.float32 else 0
    return total


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
