"""Checkpoints on real ranks: resuming bit for bit, other layouts, damage, full disks, and being killed while saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from tiny_checkpoints import write_checkpoint

WORKER = Path(__file__).with_name("checkpoint_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models; the first two phases have run in it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint("qwen3", folder / "qwen3", num_hidden_layers=2, seed=3)
    write_checkpoint("qwen3", folder / "tied", num_hidden_layers=2, seed=6, tied=True)
    write_checkpoint("qwen3_moe", folder / "qwen3_moe", num_hidden_layers=2, seed=4)
    write_checkpoint("gemma3_text", folder / "gemma3_text", num_hidden_layers=4, seed=9)
    write_checkpoint("deepseek_v3", folder / "deepseek_v3", num_hidden_layers=2, seed=8)
    write_checkpoint("nemotron_h", folder / "hybrid", hybrid_override_pattern="ME*-ME", seed=7)
    write_checkpoint("qwen3", folder / "tiny", num_hidden_layers=1, seed=5)
    return folder


def run_phase(folder: Path, phase: str, world: int) -> dict[str, Any]:
    launch(WORKER, world, [phase, str(folder)])
    return json.loads((folder / f"{phase}.json").read_text())


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, Any]:
    return run_phase(folder, "straight", 2)


@pytest.fixture(scope="module")
def resumed(folder: Path, straight: dict[str, Any]) -> dict[str, Any]:
    return run_phase(folder, "resumed", 2)


@pytest.fixture(scope="module")
def single(folder: Path, straight: dict[str, Any]) -> dict[str, Any]:
    return run_phase(folder, "single", 1)


RESUMED = (
    "tp2_sp",
    "dp2_distributed",
    "moe_ep2",
    "cp2_distributed",
    "latent_tp2",
    "sandwich_pp2",
    "hybrid_tp2_ep2",
    "hybrid_distributed",
    "sandwich_pp2",
)


@pytest.mark.parametrize("run", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits_as_one_that_never_stopped(run, straight, resumed):
    for key in ("losses", "step", "ranks"):
        assert resumed[run][key] == straight[run][key], key
    assert len(set(resumed[run]["losses"])) == 3
    assert resumed[run]["state"] == {"sampler": {"position": 3}}


@pytest.mark.parametrize(
    ("source", "phase", "target"),
    [
        ("tp2_sp", "resumed", "pp2_from_tp2"),
        ("dp2_distributed", "resumed", "pp2_from_dp2"),
        ("tp2_sp", "single", "one_from_tp2"),
        ("dp2_distributed", "single", "one_from_dp2"),
        ("moe_ep2", "single", "one_from_ep2"),
        ("latent_tp2", "single", "one_from_latent"),
        ("hybrid_tp2_ep2", "resumed", "pp2_from_hybrid"),
        ("hybrid_tp2_ep2", "single", "one_from_hybrid"),
        ("sandwich_pp2", "single", "one_from_sandwich"),
    ],
)
def test_a_checkpoint_loads_at_another_layout_with_the_same_logits_and_next_losses(
    source, phase, target, straight, resumed, single
):
    there = {"resumed": resumed, "single": single}[phase][target]
    logits, tolerance = torch.tensor(straight[source]["logits"]), 0.1 if source == "dp2_distributed" else 1e-4
    torch.testing.assert_close(torch.tensor(there["logits"]), logits, atol=tolerance, rtol=0)
    # The weights of a step's loss are drawn within 10 %, from another random state at another layout.
    for mine, theirs in zip(there["losses"], straight[source]["losses"][:2], strict=True):
        assert abs(mine / theirs - 1) < 0.15


def test_a_checkpoint_describes_itself(folder, straight):
    checkpoint = folder / "ckpt" / "tp2_sp" / "step-00000003"
    facts = json.loads((checkpoint / "millrace.json").read_text())
    assert facts["layout"]["tp"] == 2 and facts["model"]["family"] == "qwen3" and facts["optimizer_step"] == 3
    assert {"torch", "megatron-core"} <= facts["versions"].keys()
    assert (checkpoint / "hf" / "config.json").is_file() and (checkpoint / "hf" / "tokenizer.json").is_file()
    recorded = json.loads((checkpoint / "manifest.json").read_text())["files"]
    present = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert present == recorded.keys() | {"manifest.json"}


def test_a_reference_takes_weights_alone_and_leaves_the_random_state(straight, single):
    logits = torch.tensor(straight["tp2_sp"]["logits"])
    torch.testing.assert_close(torch.tensor(single["reference"]["logits"]), logits, atol=1e-4, rtol=0)
    assert single["reference"]["random_kept"]


@pytest.mark.parametrize(("kind", "says"), [("altered", "altered"), ("truncated", "truncated")])
def test_a_damaged_file_is_named_with_the_older_checkpoint_and_how_to_take_it(kind, says, single):
    message = single[kind]
    assert "step-00000002/shards/__0_0.distcp" in message and says in message
    assert "step-00000001" in message and message.endswith("latest")
    assert single[f"{kind}_older"] == {}


def test_metadata_that_names_code_is_refused_before_it_runs(single):
    assert "mkdir" in single["hostile"] and not Path("hostile-code-ran").exists()


def test_a_checkpoint_of_another_model_is_refused(single):
    assert "another model" in single["other_model"] and "qwen3_moe" in single["other_model"]


def test_a_full_disk_is_said_in_one_sentence_and_leaves_the_checkpoint_before(single):
    disk = single["full_disk"]
    if "skipped" in disk:
        pytest.skip(f"cannot mount a small file system: {disk['skipped']}")
    for when in ("foreseen", "written_into", "during_shards"):
        assert all(word in disk[when] for word in ("needs about", "MB", "small_disk/ckpt", "are free")), when
    assert disk["left"] == ["latest", "step-00000001"]
    assert disk["still_loads"] == {"good": True}


def test_a_run_killed_at_any_moment_of_a_save_finds_the_checkpoint_before(folder):
    rounds = run_phase(folder, "kills", 1)["rounds"]
    assert any(name.endswith("removed") or ".tmp-" in name for r in rounds for name in r["left"]), "no kill hit a save"
    steps = [r["loaded"]["step"] if r["loaded"] else 0 for r in rounds]
    assert steps == sorted(steps) and steps[-1] > 0
    for found in rounds:
        if found["loaded"]:
            assert found["weights"] == found["loaded"]["weights"] and found["step"] == found["loaded"]["step"]
    at_the_end = [p.name for p in (folder / "killed").iterdir() if p.name.startswith(".")]
    assert len(at_the_end) <= 1, "leftovers of earlier kills were not cleaned up"
