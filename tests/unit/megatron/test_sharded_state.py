"""What of a model's sharded state is asked of a checkpoint."""

from __future__ import annotations

import io

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemWriter

from millrace.megatron.sharded_state import without_absent_extra_states


def extra_state(module: str) -> ShardedObject:
    return ShardedObject(f"{module}._extra_state", io.BytesIO(b"scales"), (1,), (0,))


def test_extra_states_that_a_checkpoint_does_not_hold_are_not_asked_of_it(tmp_path):
    model = {
        "a.weight": ShardedTensor.from_rank_offsets("a.weight", torch.ones(2)),
        "a._extra_state": extra_state("a"),
        "b._extra_state": extra_state("b"),
        "b._extra_state1": extra_state("b.of the second expert"),
        "counter": ShardedObject("counter", 1, (1,), (0,)),
    }
    stored = {"a.weight": torch.ones(2), model["a._extra_state"].unique_key: io.BytesIO(b"scales")}
    checkpoint.save(stored, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    kept = without_absent_extra_states({"model": model}, tmp_path)["model"]
    assert list(kept) == ["a.weight", "a._extra_state", "counter"]
