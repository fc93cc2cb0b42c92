"""Gradients that are reduced while the backward pass computes are those that are reduced behind it."""

from pathlib import Path

import pytest
import torch
from ranks import launch
from tiny_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    for family in ("qwen3", "qwen3_moe"):
        write_checkpoint(family, folder / family, seed=1)
    launch(Path(__file__).with_name("overlap_worker.py"), 2, [str(folder)])
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("case", ["dense", "distributed optimizer", "experts", "pipeline", "adapters", "deterministic"])
def test_training_is_the_same_bit_for_bit(found, case):
    (losses, micro_batches, weights), (again, _, weights_again) = found[case]
    assert micro_batches > 1, "with one micro-batch nothing adds up before the reduction"
    assert again == losses and losses[0] != losses[2]
    assert weights and all(torch.equal(weights[name], weights_again[name]) for name in weights)
