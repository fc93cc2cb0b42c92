"""Models built from Transformer Engine's own modules, wherever it loads: a GPU is not needed, and no kernel runs.

Every family, at layouts that no single GPU has: what it is made of, what its checkpoints hold, and which recipe object
computes it. `test_models` and `test_fp8` compute with them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from device_runs import Found, alone
from tiny_checkpoints import write_checkpoint

from benchmarks.released_models import NEMOTRON_3_NANO
from millrace.config.schema import PrecisionConfig
from millrace.megatron.kernels import transformer_engine_is_there
from millrace.megatron.precision import engine_recipe

pytestmark = pytest.mark.skipif(
    not transformer_engine_is_there(), reason="Transformer Engine, of whose modules these models are, does not load"
)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tied": True},
    "mixtral": {"family": "mixtral"},
    "qwen3_moe": {"family": "qwen3_moe"},
    "deepseek_v3": {"family": "deepseek_v3"},
    # 16 heads: FP8 products take multiples of 16, and the columns into a Mamba layer count its heads.
    "nemotron_h": {"family": "nemotron_h", "hybrid_override_pattern": "ME*-M", "mamba_num_heads": 16},
}
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "nemotron_h")
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": ({}, 0),
    "tp2": ({"tp": 2, "sequence_parallel": True}, 1),
    "pp2 dp2": ({"pp": 2, "dp": 2}, 3),
}
"""Each with the rank that is built."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "delayed": {"fp8": "delayed", "amax_history": 16, "amax_algorithm": "most_recent", "margin": 1},
    "tensorwise": {"fp8": "tensorwise", "first_layers_bf16": 1},
    "blockwise": {"fp8": "blockwise", "last_layers_bf16": 1},
    "mxfp8": {"fp8": "mxfp8", "format": "hybrid"},
    "parameters": {"fp8": "tensorwise", "parameters": True},
}


def layout_of(model: str, name: str) -> tuple[dict[str, Any], int]:
    parallel, rank = LAYOUTS[name]
    shares_experts = model in EXPERTS and name != "one rank"
    return ({**parallel, "ep": 2} if shares_experts else parallel), rank


def jobs(paths: dict[str, str]) -> dict[str, dict[str, Any]]:
    listed: dict[str, dict[str, Any]] = {}
    for model, path in paths.items():
        for name in LAYOUTS:
            parallel, rank = layout_of(model, name)
            for linears in ("engine", "plain"):
                job = {"model": path, "parallel": parallel, "rank": rank, "gpu": "hopper", "linears": linears}
                listed[f"{model} {name} {linears}"] = job
        parallel, rank = layout_of(model, "tp2")
        for name, precision in PRECISIONS.items():
            gpu = "blackwell" if name == "mxfp8" else "hopper"
            job = {"model": path, "parallel": parallel, "rank": rank, "gpu": gpu, "linears": "engine"}
            listed[f"{model} {name}"] = {**job, "precision": precision}
    return listed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    root = tmp_path_factory.mktemp("modules")
    paths = {name: str(write_checkpoint(path=root / name, **options)) for name, options in MODELS.items()}
    nano = root / "nemotron 3 nano"
    nano.mkdir()
    (nano / "config.json").write_text(json.dumps(NEMOTRON_3_NANO))
    parallel = {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}
    released = {"model": str(nano), "parallel": parallel, "gpu": "hopper", "linears": "engine"}
    listed = jobs(paths) | {f"nano {rank}": {**released, "rank": rank} for rank in (0, 3)}
    overlap = {"overlap_tensor_parallel": True, "recompute": "selective", "recompute_modules": ["layernorm", "mlp"]}
    listed["overlap"] = {**listed["qwen3 tp2 engine"], "trainer": overlap}
    return run(root, listed)


def run(root: Path, listed: dict[str, dict[str, Any]]) -> dict[str, Found]:
    (root / "jobs.json").write_text(json.dumps(listed))
    program = Path(__file__).with_name("engine_modules.py")
    command = [sys.executable, str(program), str(root / "jobs.json"), str(root / "found.json")]
    done = subprocess.run(command, env=alone(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_hold_the_same_tensors_with_either_kind_of_layer(
    model: str, layout: str, found: dict[str, Found]
) -> None:
    engine, plain = (found[f"{model} {layout} {linears}"] for linears in ("engine", "plain"))
    assert any(name.startswith("TE") for name in engine["classes"])
    assert not any(name.startswith("TE") for name in plain["classes"])
    assert engine["checkpoint"] == plain["checkpoint"] and len(engine["checkpoint"]) > 5
    assert engine["tensors"] == plain["tensors"]
    if any(".experts." in key for key in engine["checkpoint"]):
        assert "TEColumnParallelGroupedLinear" in engine["classes"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_each_recipe_is_an_object_of_the_installed_release(model: str, precision: str, found: dict[str, Found]) -> None:
    expected = engine_recipe(PrecisionConfig(**PRECISIONS[precision]))
    assert expected is not None
    name, fields = found[f"{model} {precision}"]["recipe"]
    assert name in (expected.name, f"TE{expected.name}")
    # It takes no notice of arguments that other releases have.
    known = expected.arguments.keys() & fields.keys()
    assert len(known) >= 1 and {key: fields[key] for key in known} == {key: expected.arguments[key] for key in known}


def test_nemotron_3_nano_is_built_over_four_ranks(found: dict[str, Found]) -> None:
    """Its first and its last stage; 30 billion weights and their optimizer fit no single GPU."""
    first, last = found["nano 0"], found["nano 3"]
    assert "backbone.embeddings.weight" in first["tensors"] and "lm_head.weight" in last["tensors"]
    assert {"MambaMixer", "TEColumnParallelGroupedLinear", "TEDotProductAttention"} <= set(first["classes"])


def test_exchanges_beside_products_and_norms_computed_again_are_options_of_the_installed_release(
    found: dict[str, Found],
) -> None:
    assert found["overlap"]["checkpoint"] == found["qwen3 tp2 engine"]["checkpoint"]
