"""Weights that exist in FP8 alone: what is loaded, exported, saved and swapped is the optimizer's master weights. With
a stand-in for Transformer Engine's tensors, and Megatron-Core's own distributed optimizer."""

from pathlib import Path

import pytest
import torch
from megatron.core import fp8_utils
from ranks import launch
from rounded_weights import RoundedTensor
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint

from millrace.megatron.master_weights import require_attributes
from millrace.megatron.precision import PrecisionError

RANKS = 4
FAMILIES = {
    "tensor parallel": "qwen3",
    "experts": "qwen3_moe",
    "mxfp8": "qwen3",
    "stages and shared sequences": "qwen3",
}
TIED = ("stages and shared sequences",)
"""Cases whose first and last stage hold the embedding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masters")
    for case, family in FAMILIES.items():
        for seed, name in enumerate(("base", "other", "exact")):
            # Megatron-Core gathers MXFP8 only where all parameters are of multiples of 64 numbers.
            options = {"num_hidden_layers": 2, "head_dim": 64, "tie_word_embeddings": case in TIED}
            write_checkpoint(family, folder / case / name, seed=seed, dtype="bfloat16", **options)
        hold_exactly(folder / case / "exact" / "model.safetensors")
    write_checkpoint("qwen3", folder / "mxfp8" / "odd", dtype="bfloat16", num_hidden_layers=2, head_dim=16)
    return folder


def hold_exactly(file: Path) -> None:
    """Give matrices values of four bits within a range that E4M3 holds with any scale that such a matrix has."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            fraction, exponent = torch.frexp(tensor.float())
            short = torch.ldexp((fraction * 16).round() / 16, exponent)
            tensors[name] = torch.where(short.abs() >= short.abs().max() / 256, short, 0.0).to(tensor.dtype)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def found(folder):
    launch(Path(__file__).with_name("master_weights_worker.py"), RANKS, [str(folder)])
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", FAMILIES)
def test_whatever_reads_or_writes_weights_goes_by_the_masters(case, folder, found):
    checks = {check for of_rank in found for check in of_rank[case]} - {"exported", "without masters"}
    assert len(checks) >= 19
    for check in sorted(checks):
        different = [name for of_rank in found for name in of_rank[case][check]]
        assert not different, f"{check}: {len(different)} differ, first {different[0]}"
    names = [name for of_rank in found for name in of_rank[case]["exported"]]
    assert sorted(names) == sorted(load_file(folder / case / "base" / "model.safetensors"))


@pytest.mark.parametrize("case", FAMILIES)
def test_parameters_in_fp8_alone_would_not_have_been_the_checkpoint(case, found):
    rounded = [name for of_rank in found for name in of_rank[case]["without masters"]]
    assert any("q_proj" in name for name in rounded) and any("down_proj" in name for name in rounded)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in rounded)


def test_weights_that_lost_their_attributes_are_refused(monkeypatch):
    monkeypatch.setattr(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr(fp8_utils, "FP8_TENSOR_CLASS", RoundedTensor)
    module = torch.nn.Linear(4, 4)
    require_attributes(module)
    module.weight = torch.nn.Parameter(RoundedTensor.of(module.weight.detach()))
    with pytest.raises(PrecisionError, match="weight lost its attributes"):
        require_attributes(module)
