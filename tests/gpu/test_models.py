"""Each family on a GPU computes what CPU ranks in float32 compute, and what transformers computes on that GPU.

float32 is computed by plain layers, bfloat16 by Transformer Engine's where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_runs import DEVICES, Found, alike, farthest, mean_distance, measured
from tiny_checkpoints import write_checkpoint
from transformers_gradients import checkpoint_gradients

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tied": True},
    "gemma3_text": {"family": "gemma3_text"},
    "mixtral": {"family": "mixtral"},
    "qwen3_moe": {"family": "qwen3_moe"},
    # The widths of the released models: fused kernels for latent attention know no others.
    "deepseek_v3": {"family": "deepseek_v3", "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "nemotron_h": {"family": "nemotron_h"},
    "nemotron_h_moe": {"family": "nemotron_h", "hybrid_override_pattern": "ME*-ME"},
}
ON_CPU = ("qwen3_moe", "nemotron_h")
OF_TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen3_moe", "deepseek_v3", "nemotron_h")
"""Those whose gradients transformers has under names that the checkpoint's follow from."""

RunOn = Callable[[str], dict[str, Found]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On the CPU two of the models, on a GPU all."""
    if "model" in metafunc.fixturenames:
        cpu, cuda = DEVICES
        values = [pytest.param(cpu, model, id=f"cpu-{model}") for model in ON_CPU]
        values += [pytest.param(*cuda.values, model, marks=cuda.marks, id=f"cuda-{model}") for model in MODELS]
        metafunc.parametrize(("device", "model"), values)


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> RunOn:
    """What a device finds of the models, computed once. The CPU also gives the reference."""
    root, runs = tmp_path_factory.mktemp("models"), {}
    paths = {name: str(write_checkpoint(path=root / name, **options)) for name, options in MODELS.items()}

    def run(device: str) -> dict[str, Found]:
        if device not in runs:
            runs[device] = measured(root / f"on {device}", device, jobs(paths, device))
        return runs[device]

    return run


def jobs(paths: dict[str, str], device: str) -> dict[str, dict[str, Any]]:
    gpu = torch.cuda.is_available()
    listed: dict[str, dict[str, Any]] = {}
    if device == "cpu":
        for name in MODELS if gpu else ON_CPU:
            listed[f"{name} reference"] = {"kind": "computed", "model": paths[name], "dtype": "float32"}
    for name in ON_CPU if device == "cpu" else MODELS:
        # Micro-batches of another size than the reference's: on the CPU the two runs differ by that.
        listed[f"{name} float32"] = {"kind": "computed", "model": paths[name], "dtype": "float32", "capacity": 96}
        listed[f"{name} bfloat16"] = {"kind": "computed", "model": paths[name], "dtype": "bfloat16"}
        if name in OF_TRANSFORMERS:
            listed[f"{name} transformers"] = {"kind": "by_transformers", "model": paths[name]}
    return listed


def test_float32_is_that_of_cpu_ranks(device: str, model: str, on: RunOn, record_property: Any) -> None:
    found, expected = on(device)[f"{model} float32"], on("cpu")[f"{model} reference"]
    worst = float((found["logits"] - expected["logits"]).abs().max())
    gradients = farthest(found["gradients"], expected["gradients"])
    record_property("logits", worst)
    record_property("gradients", gradients)
    assert found["layers"] == "local"
    assert worst <= 2e-4
    assert gradients <= 1e-4
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3, abs=1e-4)


def test_float32_is_that_of_transformers_on_the_same_device(
    device: str, model: str, on: RunOn, record_property: Any
) -> None:
    if model not in OF_TRANSFORMERS:
        pytest.skip(f"transformers keeps the experts of {model} under names of its own")
    found, expected = on(device)[f"{model} float32"], on(device)[f"{model} transformers"]
    worst = float((found["logits"] - expected["logits"]).abs().max())
    named = dict(checkpoint_gradients(expected["gradients"].items(), MODELS[model]["family"]))
    gradients = farthest(found["gradients"], named)
    record_property("logits", worst)
    record_property("gradients", gradients)
    assert worst <= 2e-4
    assert gradients <= 1e-4


def test_bfloat16_stays_near_float32(device: str, model: str, on: RunOn, record_property: Any) -> None:
    """Its rounding moves log-probs by so much and no more; where tokens change their expert for it, by more."""
    found, expected = on(device)[f"{model} bfloat16"], on("cpu")[f"{model} reference"]
    experts = any(".experts." in name for name in expected["gradients"])
    moved = mean_distance(found["logp"], expected["logp"])
    agreement = alike(found["gradients"], expected["gradients"])
    record_property("logp", moved)
    record_property("gradients", agreement)
    assert 1e-4 < moved <= (0.4 if experts else 0.1)
    assert agreement >= (0.8 if experts else 0.99)
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.1, abs=0.05 if experts else 0.02)
