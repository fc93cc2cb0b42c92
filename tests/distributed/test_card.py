"""`millrace verify card` on real ranks: what it records, and that a wrong checkpoint fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_checkpoints import write_checkpoint

from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.launch.card import fitting_layouts, planned_steps


def card(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millrace.cli", "verify", "card", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_a_card_records_every_check(tmp_path: Path) -> None:
    write_checkpoint("mixtral", tmp_path / "model", num_hidden_layers=2)
    done = card(tmp_path, "--hf", "model", "--no-sync", "--layout", "one rank", "--layout", "ep2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 checks passed; the card is card.yaml" in done.stdout
    found = yaml.safe_load((tmp_path / "card.yaml").read_text())
    assert found["command"] == "millrace verify card --hf model --layout 'one rank' --layout ep2 --no-sync"
    assert (found["family"], found["model"], found["verdict"]) == ("mixtral", "model", "passed")
    assert found["versions"]["torch"]
    checks = {(check["name"], check["layout"]): check for check in found["checks"]}
    assert list(checks) == [("logits", "one rank"), ("roundtrip", "one rank"), ("roundtrip", "ep2"), ("layout", "ep2")]
    assert all(check["verdict"] == "passed" and check["seconds"] > 0 for check in checks.values())
    assert checks["roundtrip", "ep2"]["equal"] == checks["roundtrip", "ep2"]["tensors"] == 41
    assert 0 < checks["logits", "one rank"]["max_abs_diff"] <= 1e-4
    assert 0 < checks["layout", "ep2"]["max_relative_gradient_diff"] <= 1e-5
    assert checks["layout", "ep2"]["logits_max_abs_diff"] <= 1e-4


def test_a_checkpoint_that_lacks_a_tensor_fails_and_is_still_recorded(tmp_path: Path) -> None:
    import safetensors.torch

    write_checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    file = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    done = card(tmp_path, "--hf", "model", "--no-sync", "--layout", "one rank")
    assert done.returncode == 1
    assert "the checkpoint lacks model.layers.0.mlp.up_proj.weight" in done.stderr
    found = yaml.safe_load((tmp_path / "card.yaml").read_text())
    assert found["verdict"] == "failed" and len(found["checks"]) == 2
    for check in found["checks"]:
        assert check["verdict"] == "failed"
        assert check["summary"].startswith("rank-0: the checkpoint lacks model.layers.0.mlp.up_proj.weight")


def test_layouts_are_chosen_by_what_the_model_can_be_cut_into(tmp_path: Path) -> None:
    dense = ModelShape.from_hf(write_checkpoint("llama", tmp_path / "dense", num_hidden_layers=3))
    moe = ModelShape.from_hf(write_checkpoint("qwen3_moe", tmp_path / "moe"))
    hybrid = ModelShape.from_hf(write_checkpoint("nemotron_h", tmp_path / "hybrid"))
    assert list(fitting_layouts(dense)) == ["one rank", "tp2", "pp2", "cp2", "tp2 pp2"]
    assert list(fitting_layouts(hybrid)) == ["one rank", "tp2", "pp2", "tp2 pp2"]
    experts = ["one rank", "tp2", "tp2 etp2", "pp2", "cp2", "ep2", "tp2 pp2", "tp2 pp2 ep2"]
    assert list(fitting_layouts(moe)) == experts
    with pytest.raises(ConfigError, match=r"'ep2' does not fit this model; those that do are one rank, tp2, pp2, cp2"):
        planned_steps(dense, sync=False, only=["ep2"])
