"""Converting and verifying at real layouts: each set of ranks runs a list of commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from ranks import launch
from safetensors.torch import save_file
from tiny_checkpoints import write_checkpoint

from millrace.config.model_shape import ModelShape
from millrace.conversion import Options, hf_to_megatron, megatron_to_hf
from millrace.converters.mapping import FAMILIES
from millrace.converters.safetensors_io import INDEX, HFReader
from millrace.converters.torch_metadata import stored_tensors
from millrace.ports import free_port

MODELS: dict[str, dict] = {**{family: {} for family in FAMILIES}, "nemotron_h-moe": {"hybrid_override_pattern": "ME*E"}}
"""The tiny checkpoints that converter and ranks exchange: one of every family, with keys of its config.json."""

WORKER = Path(__file__).with_name("conversion_worker.py")


def run_steps(folder: Path, world: int, steps: list[tuple[str, str]]) -> list[int]:
    """Exit codes of "program: arguments" steps that `world` ranks run one after the other."""
    file, codes = folder / f"steps-{world}.json", folder / f"codes-{world}.json"
    described = [{"program": p, "arguments": a.split(), "port": free_port()} for p, a in steps]
    file.write_text(json.dumps(described))
    launch(WORKER, world, [str(file), str(codes)], timeout=600)
    return json.loads(codes.read_text())


def card(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def same_tensors(one: Path, other: Path) -> bool:
    a, b = HFReader(one), HFReader(other)
    if any(a.lazy(n).dtype != b.lazy(n).dtype for n in a.names if n in b):
        return False
    return set(a.names) == set(b.names) and all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names)


def test_one_and_two_ranks_verify(tmp_path):
    tied = write_checkpoint("qwen3", tmp_path / "tied", tied=True, vocab_size=301, dtype="bfloat16")
    llama = write_checkpoint("llama", tmp_path / "llama", shards=2)
    moe = write_checkpoint("qwen3_moe", tmp_path / "moe", mlp_only_layers=[0])
    hybrid = write_checkpoint("nemotron_h", tmp_path / "hybrid", hybrid_override_pattern="ME*-ME", dtype="bfloat16")
    other = write_checkpoint("llama", tmp_path / "other", seed=1)
    right, wrong = tmp_path / "right.safetensors", tmp_path / "wrong.safetensors"
    one_rank = [
        ("verify", f"layout-reference --hf {llama} --reference {right}"),
        ("verify", f"layout-reference --hf {other} --reference {wrong}"),
        ("verify", f"roundtrip --hf {moe}"),
        ("verify", f"logits --hf {moe} --tokens 5,300,7,7,12"),
    ]
    assert run_steps(tmp_path, 1, one_rank) == [0, 0, 0, 0]
    two_ranks = [
        ("verify", f"roundtrip --hf {tied} --tp 2 --card {tmp_path}/tied.yaml"),
        ("verify", f"roundtrip --hf {tied} --pp 2"),
        ("verify", f"roundtrip --hf {moe} --ep 2"),
        ("verify", f"roundtrip --hf {moe} --dp 2 --dtype float32"),
        ("verify", f"logits --hf {tied} --tp 2"),
        ("verify", f"logits --hf {hybrid} --tp 2 --ep 2"),
        ("verify", f"layout --hf {hybrid} --tp 2 --ep 2 --card {tmp_path}/biased.yaml"),
        ("verify", f"roundtrip --hf {hybrid} --tp 2 --etp 2 --card {tmp_path}/hybrid.yaml"),
        ("verify", f"layout --hf {llama} --reference {right} --tp 2 --card {tmp_path}/layout.yaml"),
        ("verify", f"layout --hf {llama} --reference {wrong} --pp 2 --card {tmp_path}/wrong.yaml"),
        ("altered", f"roundtrip --hf {llama} --tp 2 --card {tmp_path}/altered.yaml"),
    ]
    assert run_steps(tmp_path, 2, two_ranks) == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]

    assert card(tmp_path / "tied.yaml")["verdict"] == "passed" and card(tmp_path / "tied.yaml")["equal"] == 46
    assert card(tmp_path / "layout.yaml")["max_relative_gradient_diff"] < 1e-5
    assert "first at sequence 0, position 0" in card(tmp_path / "wrong.yaml")["summary"]
    assert card(tmp_path / "biased.yaml")["max_relative_gradient_diff"] < 1e-5
    # The router's correction bias is float32 in a bfloat16 model.
    assert card(tmp_path / "hybrid.yaml")["dtype"] == "bfloat16"
    # Row 5 of the last rank's shard is row 64 + 5 of the gate.
    altered = card(tmp_path / "altered.yaml")
    assert altered["summary"] == ("model.layers.3.mlp.gate_proj.weight differs in 1 of 8192 elements, by 0.5 at most")
    assert altered["equal"] == altered["tensors"] - 1


def test_a_hybrid_with_experts_converts_both_ways_bitwise(tmp_path):
    hybrid = write_checkpoint("nemotron_h", tmp_path / "hybrid", hybrid_override_pattern="ME*-ME", dtype="bfloat16")
    hf_to_megatron(hybrid, tmp_path / "megatron", Options(processes=1))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", Options(processes=1))
    assert same_tensors(hybrid, tmp_path / "back")


def add_prediction_layer(folder: Path, layer: int) -> None:
    """Put tensors of a layer for multi-token prediction behind the others, in a file of their own."""
    tensors = {
        f"model.layers.{layer}.eh_proj.weight": torch.ones(64, 128),
        f"model.layers.{layer}.enorm.weight": torch.ones(64),
    }
    save_file(tensors, folder / "model-prediction.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-prediction.safetensors")
    (folder / INDEX).write_text(json.dumps(index))


def test_latent_attention_converts_and_layers_for_prediction_stay_behind(tmp_path):
    layers = {"num_hidden_layers": 4, "dtype": "bfloat16"}
    plain = write_checkpoint("deepseek_v3", tmp_path / "plain", **layers)
    released = write_checkpoint("deepseek_v3", tmp_path / "released", num_nextn_predict_layers=1, shards=2, **layers)
    add_prediction_layer(released, 4)
    steps = [
        ("verify", f"roundtrip --hf {plain} --tp 2 --etp 2 --dtype bfloat16 --card {tmp_path}/card.yaml"),
        ("verify", f"roundtrip --hf {released} --dp 2 --ep 2"),
        ("verify", f"roundtrip --hf {released} --pp 2"),
    ]
    assert run_steps(tmp_path, 2, steps) == [0] * 3
    recorded = card(tmp_path / "card.yaml")
    assert recorded["equal"] == recorded["tensors"] == len(HFReader(plain).names)
    hf_to_megatron(released, tmp_path / "megatron", Options(processes=1))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", Options(processes=1))
    assert same_tensors(plain, tmp_path / "back")
    assert {HFReader(tmp_path / "back").tensor(name).dtype for name in HFReader(plain).names} == {
        torch.bfloat16,
        torch.float32,
    }
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_four_ranks_verify_and_exchange_checkpoints_with_the_converter(tmp_path):
    dense = write_checkpoint("qwen3", tmp_path / "dense", tied=True, vocab_size=301, dtype="bfloat16")
    moe = write_checkpoint("qwen3_moe", tmp_path / "moe", dtype="bfloat16")
    latent = write_checkpoint("deepseek_v3", tmp_path / "latent", num_hidden_layers=4)
    odd = write_checkpoint("qwen3", tmp_path / "odd", num_hidden_layers=3, dtype="bfloat16")  # stages of 2 and 1 layers
    for model in (dense, moe, odd):
        hf_to_megatron(model, tmp_path / f"{model.name}-streamed", Options(processes=1))
    steps = [
        ("verify", f"roundtrip --hf {dense} --tp 2 --pp 2"),
        ("verify", f"roundtrip --hf {moe} --tp 2 --etp 2 --pp 2"),
        ("verify", f"roundtrip --hf {latent} --tp 2 --ep 2 --pp 2"),
        ("checkpoint", f"--hf {dense} --save {tmp_path}/dense-saved --tp 2 --pp 2"),
        ("checkpoint", f"--hf {moe} --save {tmp_path}/moe-saved --tp 2 --etp 2 --ep 2"),
        ("checkpoint", f"--hf {dense} --load {tmp_path}/dense-streamed --out {tmp_path}/dense-loaded --tp 2 --pp 2"),
        ("checkpoint", f"--hf {moe} --load {tmp_path}/moe-streamed --out {tmp_path}/moe-loaded --pp 2 --ep 2"),
        ("checkpoint", f"--hf {odd} --save {tmp_path}/odd-saved --tp 2 --pp 2"),
        ("checkpoint", f"--hf {odd} --load {tmp_path}/odd-streamed --out {tmp_path}/odd-loaded --tp 2 --pp 2"),
    ]
    assert run_steps(tmp_path, 4, steps) == [0] * len(steps)
    for model in (dense, moe, odd):
        megatron_to_hf(tmp_path / f"{model.name}-saved", tmp_path / f"{model.name}-back", Options(processes=1))
        assert same_tensors(model, tmp_path / f"{model.name}-loaded")
        assert same_tensors(model, tmp_path / f"{model.name}-back")


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every family: a checkpoint, streamed; one that two ranks saved; and what two other ranks loaded."""
    folder, steps = tmp_path_factory.mktemp("exchanged"), []
    for family, more in MODELS.items():
        hf = write_checkpoint(
            family.removesuffix("-moe"), folder / family, **more, vocab_size=301, dtype="bfloat16", shards=2
        )
        hf_to_megatron(hf, folder / f"{family}-streamed", Options(processes=1, shard_bytes=200_000))
        other = "--ep 2" if ModelShape.from_hf(hf).num_experts else "--pp 2"
        steps += [
            ("checkpoint", f"--hf {hf} --save {folder}/{family}-saved --tp 2"),
            ("checkpoint", f"--hf {hf} --load {folder}/{family}-streamed --out {folder}/{family}-loaded {other}"),
        ]
    assert run_steps(folder, 2, steps) == [0] * len(steps)
    return folder


@pytest.mark.parametrize("family", MODELS)
def test_a_streamed_checkpoint_has_the_tensors_of_one_that_ranks_save(exchanged, family):
    streamed, saved = (
        stored_tensors(exchanged / f"{family}-{how}" / "step-00000000" / "shards") for how in ("streamed", "saved")
    )
    assert streamed.keys() == saved.keys()
    for key, tensor in streamed.items():
        assert tensor.dtype == saved[key].dtype, key
        # Tensor-parallel ranks pad the vocabulary to a multiple of 64 rows each.
        vocabulary = tensor.shape[0] == 320
        assert saved[key].shape == ((384, *tensor.shape[1:]) if vocabulary else tensor.shape), key


@pytest.mark.parametrize("family", MODELS)
def test_ranks_load_a_streamed_checkpoint_bitwise(exchanged, family):
    assert same_tensors(exchanged / family, exchanged / f"{family}-loaded")


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("how", ["saved", "streamed"])
def test_a_megatron_checkpoint_is_streamed_back_bitwise(exchanged, family, how, tmp_path):
    megatron_to_hf(exchanged / f"{family}-{how}", tmp_path / "back", Options(processes=1, shard_bytes=300_000))
    assert same_tensors(exchanged / family, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "back" / "tokenizer.json").is_file()
