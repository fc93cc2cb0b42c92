"""Weights that pass through the trainer's model leave no trace in what it learns, master weights included."""

from pathlib import Path

import pytest
import torch
from ranks import launch
from tiny_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lent")
    write_checkpoint("qwen3", folder / "base", seed=1, dtype="bfloat16")
    write_checkpoint("qwen3", folder / "other", seed=2, dtype="bfloat16")
    launch(Path(__file__).with_name("lent_weights_worker.py"), 1, [str(folder)])
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_a_model_that_lent_its_place_learns_as_if_it_had_not(optimizer, found):
    undisturbed, lent = found[f"{optimizer}, undisturbed"], found[f"{optimizer}, lent"]
    different = [name for name in undisturbed if not torch.equal(undisturbed[name], lent[name])]
    assert undisturbed and not different, f"{len(different)} of {len(undisturbed)} tensors differ, first {different[0]}"
