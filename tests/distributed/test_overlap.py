"""Gradients that are reduced while the backward pass computes are those that are reduced behind it; and micro-batches
that are padded to fill buffers of a fixed size give what others give."""

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


def test_micro_batches_that_fill_their_buffers_give_the_same_gradients_and_log_probs(found):
    (tokens, logp, logits, gradients), (filled, filled_logp, filled_logits, filled_gradients) = found["padded"]
    assert len(filled) == len(tokens) > 1 and set(filled) == {64} and min(tokens) < 64
    assert torch.allclose(filled_logp, logp, rtol=0, atol=1e-6)
    assert torch.allclose(filled_logits, logits, rtol=0, atol=1e-6)
    assert gradients.keys() == filled_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(filled_gradients[name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max())), name
