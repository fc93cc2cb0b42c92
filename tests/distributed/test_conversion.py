"""Converting and verifying at real layouts: each set of ranks runs a list of commands."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from ranks import free_port, launch
from safetensors.torch import save_file
from tiny_checkpoints import write_checkpoint

from millrace.converters.safetensors_io import INDEX, HFReader

WORKER = Path(__file__).with_name("conversion_worker.py")


def run_steps(folder: Path, world: int, steps: list[tuple[str, str]]) -> list[int]:
    """Exit codes of "program: arguments" steps that `world` ranks run one after the other."""
    file, codes = folder / f"steps-{world}.json", folder / f"codes-{world}.json"
    described = [{"program": p, "arguments": a.split(), "port": free_port()} for p, a in steps]
    file.write_text(json.dumps(described))
    launch(WORKER, world, [str(file), str(codes)], timeout=240)
    return json.loads(codes.read_text())


def card(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def same_tensors(one: Path, other: Path) -> bool:
    a, b = HFReader(one), HFReader(other)
    return set(a.names) == set(b.names) and all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names)


def test_one_and_two_ranks_convert_and_verify(tmp_path):
    tied = write_checkpoint("qwen3", tmp_path / "tied", tied=True, vocab_size=301, dtype="bfloat16")
    llama = write_checkpoint("llama", tmp_path / "llama", shards=2)
    moe = write_checkpoint("qwen3_moe", tmp_path / "moe", mlp_only_layers=[0])
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
        ("verify", f"layout --hf {llama} --reference {right} --tp 2 --card {tmp_path}/layout.yaml"),
        ("verify", f"layout --hf {llama} --reference {wrong} --pp 2 --card {tmp_path}/wrong.yaml"),
        ("altered", f"roundtrip --hf {llama} --tp 2 --card {tmp_path}/altered.yaml"),
        ("convert", f"hf-to-megatron --hf {tied} --out {tmp_path}/megatron --tp 2"),
        ("convert", f"megatron-to-hf --checkpoint {tmp_path}/megatron --out {tmp_path}/back --pp 2"),
        ("convert", f"megatron-to-hf --checkpoint {tmp_path}/megatron --out {tmp_path}/back --pp 2"),
    ]
    assert run_steps(tmp_path, 2, two_ranks) == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1]

    assert card(tmp_path / "tied.yaml")["verdict"] == "passed" and card(tmp_path / "tied.yaml")["equal"] == 46
    assert card(tmp_path / "layout.yaml")["max_relative_gradient_diff"] < 1e-5
    assert "first at sequence 0, position 0" in card(tmp_path / "wrong.yaml")["summary"]
    # Row 5 of the last rank's shard is row 64 + 5 of the gate.
    altered = card(tmp_path / "altered.yaml")
    assert altered["summary"] == ("model.layers.3.mlp.gate_proj.weight differs in 1 of 8192 elements, by 0.5 at most")
    assert altered["equal"] == altered["tensors"] - 1
    assert same_tensors(tied, tmp_path / "back")


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
        ("convert", f"hf-to-megatron --hf {released} --out {tmp_path}/megatron --tp 2 --etp 2 --dtype bfloat16"),
        ("convert", f"megatron-to-hf --checkpoint {tmp_path}/megatron --out {tmp_path}/back --pp 2"),
    ]
    assert run_steps(tmp_path, 2, steps) == [0] * 5
    recorded = card(tmp_path / "card.yaml")
    assert recorded["equal"] == recorded["tensors"] == len(HFReader(plain).names)
    assert same_tensors(plain, tmp_path / "back")
    assert {HFReader(tmp_path / "back").tensor(name).dtype for name in HFReader(plain).names} == {
        torch.bfloat16,
        torch.float32,
    }
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_four_ranks_convert_between_layouts(tmp_path):
    dense = write_checkpoint("qwen3", tmp_path / "dense", tied=True)
    moe = write_checkpoint("qwen3_moe", tmp_path / "moe", dtype="bfloat16")
    latent = write_checkpoint("deepseek_v3", tmp_path / "latent", num_hidden_layers=4)
    steps = [
        ("verify", f"roundtrip --hf {dense} --tp 2 --pp 2"),
        ("verify", f"roundtrip --hf {moe} --tp 2 --etp 2 --pp 2"),
        ("verify", f"roundtrip --hf {latent} --tp 2 --ep 2 --pp 2"),
        ("convert", f"hf-to-megatron --hf {moe} --out {tmp_path}/megatron --tp 2 --ep 2"),
        ("convert", f"megatron-to-hf --checkpoint {tmp_path}/megatron --out {tmp_path}/back --pp 2 --ep 2"),
    ]
    assert run_steps(tmp_path, 4, steps) == [0] * 5
    assert same_tensors(moe, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
