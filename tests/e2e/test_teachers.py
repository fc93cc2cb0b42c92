"""A teacher says the same wherever it lives, and what transformers says."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import write_checkpoint
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from ranks import launch
from teachers_worker import LENGTHS, MEMBERS, PLACEMENTS, sequences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    write_checkpoint("qwen3", folder / "base", seed=1)
    write_checkpoint("qwen3", folder / "other", seed=2)
    launch(Path(__file__).with_name("teachers_worker.py"), 2, [str(folder)], timeout=600)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def expected(folder):
    """Log-probs of every token under its own teacher, from transformers."""
    models = {
        label: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for label, name in (("start", "base"), ("other", "other"))
    }
    scores = []
    for index, tokens in enumerate(sequences()):
        teacher = models[next(label for label, members in MEMBERS.items() if index in members)]
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logp = teacher(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        scores.append(torch.cat([torch.zeros(1), logp]))
    return torch.cat(scores)


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_placement_gives_the_log_probs_that_transformers_gives(placement, found, expected):
    assert found[placement].shape == (sum(LENGTHS),)
    assert (found[placement] - expected).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_policy_keeps_its_weights_bit_for_bit(placement, found):
    assert found[f"unchanged after {placement}"]
