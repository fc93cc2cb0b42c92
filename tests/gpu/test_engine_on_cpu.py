"""Policies whose layers are Transformer Engine's modules compute and learn what those of plain layers do.

Here it runs on CPU ranks, its kernels exchanged for torch's arithmetic (`engine_on_cpu`): what is shown is that every
module is handed the right tensors and arguments at every layout, wherever the package imports. `test_models` shows
what its kernels compute, on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import Found, alone, farthest, mean_distance, measured
from tiny_checkpoints import write_checkpoint

from millrace.megatron.kernels import transformer_engine_is_there

pytestmark = pytest.mark.skipif(
    not transformer_engine_is_there(), reason="Transformer Engine, of whose modules these models are, does not load"
)

PROGRAM = Path(__file__).with_name("engine_on_cpu.py")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tied": True},
    "mixtral": {"family": "mixtral"},
    "qwen3_moe": {"family": "qwen3_moe"},
    "deepseek_v3": {"family": "deepseek_v3"},
    "nemotron_h": {"family": "nemotron_h", "hybrid_override_pattern": "ME*-ME"},
}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "qwen3 tp2 pp2": (4, ["--tp", "2", "--pp", "2"]),
    "qwen3_moe tp2 ep2": (2, ["--tp", "2", "--ep", "2"]),
    "qwen3_moe ep2 pp2": (4, ["--ep", "2", "--pp", "2", "--dp", "2"]),
    "deepseek_v3 tp2 ep2": (2, ["--tp", "2", "--ep", "2"]),
    "nemotron_h tp2 ep2": (2, ["--tp", "2", "--ep", "2"]),
    "qwen2 dp2": (2, ["--dp", "2"]),
}
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "adapters": ("qwen3", {"lora": {"rank": 4}}),
    "adapters of experts": ("qwen3_moe", {"lora": {"rank": 4}}),
    "adapters of Mamba layers": ("nemotron_h", {"lora": {"rank": 4}}),
    "adapters of latents": ("deepseek_v3", {"lora": {"rank": 4}}),
    "all computed again": ("qwen3_moe", {"switches": {"recompute": "full"}}),
    "norms computed again": (
        "qwen3_moe",
        {"switches": {"recompute": "selective", "recompute_modules": ("layernorm", "moe_act")}},
    ),
    "overlaps": (
        "qwen3_moe",
        {"distributed": True, "switches": {"overlap_gradient_reduction": True, "overlap_parameter_gather": True}},
    ),
    "experts one by one": ("qwen3_moe", {"switches": {"grouped_gemm": False}}),
}

IN_FP8 = ("qwen3", "qwen3_moe", "deepseek_v3")
LINEARS = ("self_attention.linear_proj", "mlp.linear_fc2")
"""Without a norm fused into them."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: str(write_checkpoint(path=root / name, **options)) for name, options in MODELS.items()}


@pytest.fixture(scope="module")
def found(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What policies of either kind of layers compute, and one of experts whose checkpoint the other takes over."""
    root = tmp_path_factory.mktemp("found")
    once = {"kind": "trained", "model": paths["qwen3_moe"], "dtype": "bfloat16", "distributed": True, "steps": 2}
    saved = {kind: str(root / f"saved by {kind}") for kind in ("engine", "plain")}

    def jobs(kind: str, other: str) -> dict[str, dict[str, Any]]:
        listed = {
            f"{kind} {name} {dtype}": {"kind": "computed", "model": path, "dtype": dtype}
            for name, path in paths.items()
            for dtype in ("float32", "bfloat16")
        }
        listed[f"{kind} whole"] = {**once, "steps": 4}
        listed[f"{kind} first half"] = {**once, "save": saved[kind]}
        fp8 = {"precision": {"fp8": "tensorwise", "emulate": kind == "plain"}}
        for name in IN_FP8:
            # The reference multiplies the experts' matrices one by one.
            job = {"kind": "computed", "model": paths[name], "dtype": "float32", "switches": {"grouped_gemm": False}}
            listed[f"{kind} {name} in FP8"] = job | fp8
        for name in LINEARS:
            listed[f"{kind} {name}"] = {"kind": "one_linear", "model": paths["qwen3"], "linear_name": name} | fp8
        for name, (model, options) in SWITCHES.items():
            # Plain layers show what it comes to without them, adapters apart.
            options = options if kind == "engine" or "lora" in options else {}
            job = {"kind": "trained", "model": paths[model], "dtype": "float32", "distributed": False, "steps": 3}
            listed[f"{kind} {name}"] = job | options
        if Path(saved[other]).exists():
            listed[f"{kind} second half"] = {**once, "load": saved[other]}
        return listed

    result = measured(root / "plain", "cpu", jobs("plain", "engine"))
    result |= measured(root / "engine", "cpu", jobs("engine", "plain"), program=PROGRAM)
    return result


@pytest.mark.parametrize("model", MODELS)
def test_float32_is_that_of_plain_layers(model: str, found: dict[str, Found], record_property: Any) -> None:
    engine, plain = (found[f"{kind} {model} float32"] for kind in ("engine", "plain"))
    assert (engine["layers"], plain["layers"]) == ("transformer_engine", "local")
    worst = float((engine["logits"] - plain["logits"]).abs().max())
    gradients = farthest(engine["gradients"], plain["gradients"])
    record_property("logits", worst)
    record_property("gradients", gradients)
    assert worst <= 5e-5
    assert gradients <= 1e-5
    assert engine["losses"] == pytest.approx(plain["losses"], rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_no_farther_from_float32_than_that_of_plain_layers(model: str, found: dict[str, Found]) -> None:
    exact = found[f"plain {model} float32"]["logp"]
    engine, plain = (mean_distance(found[f"{k} {model} bfloat16"]["logp"], exact) for k in ("engine", "plain"))
    assert 1e-4 < engine < 2 * plain


def test_a_run_goes_on_from_the_checkpoint_of_plain_layers(found: dict[str, Found]) -> None:
    second, whole = found["engine second half"], found["engine whole"]
    assert second["step"] == 4
    assert second["losses"] == pytest.approx(whole["losses"][2:], rel=0.05)
    assert torch.isfinite(second["logits"]).all()


@pytest.mark.parametrize("linear", LINEARS)
def test_the_emulation_rounds_a_linear_as_their_reference_does(linear: str, found: dict[str, Found]) -> None:
    reference, emulated = (found[f"{kind} {linear}"] for kind in ("engine", "plain"))
    assert farthest(reference, emulated) <= 1e-6
    exact = {"y": emulated["y without FP8"]}
    assert farthest({"y": emulated["y"]}, exact) > 0.01


@pytest.mark.parametrize("model", IN_FP8)
def test_the_emulation_of_a_model_is_near_their_reference(model: str, found: dict[str, Found]) -> None:
    """Both are the same but for sums of another order, which let a few numbers fall to the other side of a rounding:
    from there on everything differs a little."""
    names = (f"engine {model} in FP8", f"plain {model} in FP8", f"plain {model} float32")
    reference, emulated, exact = (found[name]["logp"] for name in names)
    assert mean_distance(reference, emulated) <= 0.3 * mean_distance(exact, emulated)


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_trained_with_a_switch_is_that_of_plain_layers(switch: str, found: dict[str, Found]) -> None:
    engine, plain = (found[f"{kind} {switch}"] for kind in ("engine", "plain"))
    assert engine["losses"] == pytest.approx(plain["losses"], rel=1e-4, abs=1e-5)
    assert float((engine["logits"] - plain["logits"]).abs().max()) <= 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_compute_what_one_rank_of_plain_layers_does(layout: str, paths: dict[str, str], tmp_path: Path) -> None:
    """Logits and every gradient."""
    count, options = LAYOUTS[layout]
    command = [sys.executable, str(PROGRAM), "layout", "--hf", paths[layout.split()[0]], *options, "--device", "cpu"]
    everywhere = {**alone(), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(count)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=everywhere | own, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = [log.read_text()[-4000:] for log in logs]
    assert codes == [0] * count, "\n".join(said)
    assert any("gradients of" in text for text in said)
