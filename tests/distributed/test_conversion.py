"""Converting and verifying at real layouts: each set of ranks runs a list of commands."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from ranks import free_port, launch
from tiny_checkpoints import write_checkpoint

from millrace.converters.safetensors_io import HFReader

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
        ("convert", f"hf-to-megatron --hf {hybrid} --out {tmp_path}/hybrid-megatron --tp 2 --etp 2"),
        ("convert", f"megatron-to-hf --checkpoint {tmp_path}/hybrid-megatron --out {tmp_path}/hybrid-back --pp 2"),
        ("verify", f"layout --hf {llama} --reference {right} --tp 2 --card {tmp_path}/layout.yaml"),
        ("verify", f"layout --hf {llama} --reference {wrong} --pp 2 --card {tmp_path}/wrong.yaml"),
        ("altered", f"roundtrip --hf {llama} --tp 2 --card {tmp_path}/altered.yaml"),
        ("convert", f"hf-to-megatron --hf {tied} --out {tmp_path}/megatron --tp 2"),
        ("convert", f"megatron-to-hf --checkpoint {tmp_path}/megatron --out {tmp_path}/back --pp 2"),
        ("convert", f"megatron-to-hf --checkpoint {tmp_path}/megatron --out {tmp_path}/back --pp 2"),
    ]
    assert run_steps(tmp_path, 2, two_ranks) == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1]

    assert card(tmp_path / "tied.yaml")["verdict"] == "passed" and card(tmp_path / "tied.yaml")["equal"] == 46
    assert card(tmp_path / "layout.yaml")["max_relative_gradient_diff"] < 1e-5
    assert "first at sequence 0, position 0" in card(tmp_path / "wrong.yaml")["summary"]
    # Row 5 of the last rank's shard is row 64 + 5 of the gate.
    altered = card(tmp_path / "altered.yaml")
    assert altered["summary"] == ("model.layers.3.mlp.gate_proj.weight differs in 1 of 8192 elements, by 0.5 at most")
    assert altered["equal"] == altered["tensors"] - 1
    assert same_tensors(tied, tmp_path / "back") and same_tensors(hybrid, tmp_path / "hybrid-back")


def test_four_ranks_convert_between_layouts(tmp_path):
    dense = write_checkpoint("qwen3", tmp_path / "dense", tied=True)
    moe = write_checkpoint("qwen3_moe", tmp_path / "moe", dtype="bfloat16")
    steps = [
        ("verify", f"roundtrip --hf {dense} --tp 2 --pp 2"),
        ("verify", f"roundtrip --hf {moe} --tp 2 --etp 2 --pp 2"),
        ("convert", f"hf-to-megatron --hf {moe} --out {tmp_path}/megatron --tp 2 --ep 2"),
        ("convert", f"megatron-to-hf --checkpoint {tmp_path}/megatron --out {tmp_path}/back --pp 2 --ep 2"),
    ]
    assert run_steps(tmp_path, 4, steps) == [0, 0, 0, 0]
    assert same_tensors(moe, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
