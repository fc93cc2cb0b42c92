"""Parameters that are gathered while the next forward pass computes are those that are gathered in the update: for
training, and for whatever reads them in between."""

from pathlib import Path

import pytest
import torch
from ranks import launch
from tiny_checkpoints import write_checkpoint

RANKS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    for family in ("qwen3", "qwen3_moe", "gemma3_text", "nemotron_h"):
        write_checkpoint(family, folder / family, seed=1)
    launch(Path(__file__).with_name("parameter_gather_worker.py"), RANKS, [str(folder)])
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", ["experts", "tied, in a pipeline", "hybrid", "adapters"])
def test_every_reader_finds_the_whole_of_an_update(found, case):
    for of_rank in found:
        at_once, overlapped = of_rank[case]
        parts = [outcome.pop("left in parts") for outcome in (at_once, overlapped)]
        assert at_once.keys() == overlapped.keys()
        different = [name for name, value in at_once.items() if not torch.equal(value, overlapped[name])]
        assert not different, f"{len(different)} of {len(at_once)} differ, first {different[0]}"
        assert parts == [False, True], "an update left nothing to gather, so that nothing was tried"


@pytest.mark.parametrize("case", ["experts", "tied, in a pipeline", "adapters"])
def test_a_checkpoint_keeps_the_optimizer_of_many_buckets(found, case):
    assert all(outcome["optimizer as saved"] for of_rank in found for outcome in of_rank[case])
