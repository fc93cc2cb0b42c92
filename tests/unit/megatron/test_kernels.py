"""Which modules and kernels a run on CUDA is built from.

Transformer Engine loads only beside torch's CUDA build. What is observed here is the choice alone: classes of its
names, empty, stand where Megatron-Core would have put its own, and the specifications are built and read, but no module
is. `tests/gpu/test_engine_modules.py` builds the modules where it does load.
"""

import dataclasses
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import optimizer
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from tiny_checkpoints import FAMILIES, write_checkpoint
from without_engine import without_engine

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ParallelConfig, TrainerConfig
from millrace.megatron import kernels, model_config
from millrace.megatron.gaps import scan_state_spaces_in_torch
from millrace.megatron.kernels import kernels_in_use, uses_transformer_engine
from millrace.megatron.model_config import transformer_config
from millrace.megatron.specs import block_spec

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STAND_INS = (
    *(
        "TEColumnParallelGroupedLinear",
        "TEColumnParallelLinear",
        "TEDotProductAttention",
        "TELayerNormColumnParallelLinear",
    ),
    *("TELinear", "TENorm", "TERowParallelGroupedLinear", "TERowParallelLinear"),
)
LOCAL = ("mistral", "gemma3_text")
"""Families with layers that Transformer Engine has none like."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine, as far as the choice of modules goes."""
    provider = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    for name in STAND_INS:
        stand_in = type(name, (), {})
        for module in (provider, extension, gpt_layer_specs):
            monkeypatch.setattr(module, name, stand_in, raising=False)
    for module in (provider, gpt_layer_specs):
        monkeypatch.setattr(module, "is_te_min_version", lambda *version, **options: True, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    for kernel in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(rope_utils, kernel, print)
    monkeypatch.setattr(kernels, "HAVE_TE", True)


def shape_of(folder: Path, family: str, **options: Any) -> ModelShape:
    return ModelShape.from_hf(write_checkpoint(family, folder / family, **options))


def modules(shape: ModelShape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> set[str]:
    """Names of the classes that the layers of a model are built from."""
    scan_state_spaces_in_torch()
    config = transformer_config(shape, ParallelConfig(), TrainerConfig(), dtype, device)
    spec = block_spec(config, shape.layers, shape.mamba)
    return {name for layer in spec.layer_specs for name in named(layer)} | {spec.layer_norm.__name__}


def named(spec: Any) -> Iterator[str]:
    if isinstance(spec, ModuleSpec):
        yield from named(spec.module)
        yield from named(spec.submodules)
    elif isinstance(spec, functools.partial):
        yield from named(spec.func)
        yield from named(spec.keywords.get("submodules"))
    elif dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        for field in dataclasses.fields(spec):
            yield from named(getattr(spec, field.name))
    elif isinstance(spec, type):
        yield spec.__name__


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(LOCAL)))
def test_every_family_is_built_from_transformer_engine_on_cuda(family: str, tmp_path: Path, engine: None) -> None:
    options = {"hybrid_override_pattern": "ME*-M"} if family == "nemotron_h" else {}
    shape = shape_of(tmp_path, family, **options)
    found = modules(shape, CUDA)
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention", "TENorm"} <= found
    assert not found & {"ColumnParallelLinear", "RowParallelLinear", "RMSNorm", "PackedAttention"}
    if shape.num_experts:
        assert {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "TEGroupedMLP"} <= found
    if shape.mamba is not None:
        assert {"MambaMixer", "MambaBlockLayer"} <= found


@without_engine
@pytest.mark.parametrize("family", FAMILIES)
def test_without_it_every_family_is_built_from_megatrons_own_layers(family: str, tmp_path: Path) -> None:
    found = modules(shape_of(tmp_path, family), CUDA)
    assert {"ColumnParallelLinear", "RowParallelLinear", "RMSNorm", "PackedAttention"} <= found
    assert not {name for name in found if name.startswith("TE")}


@pytest.mark.parametrize("family", LOCAL)
def test_layers_that_transformer_engine_has_none_like_stay_plain(family: str, tmp_path: Path, engine: None) -> None:
    shape = shape_of(tmp_path, family)
    assert "RMSNorm" in modules(shape, CUDA)
    (layers, *_) = said(shape)
    assert layers.startswith("layers: plain torch") and f"has no layers like those of {shape.family}" in layers


def test_float32_and_the_cpu_are_computed_by_plain_layers(tmp_path: Path, engine: None) -> None:
    shape = shape_of(tmp_path, "qwen3")
    assert uses_transformer_engine(shape, CUDA, torch.bfloat16)
    assert not uses_transformer_engine(shape, CUDA, torch.float32)
    assert not uses_transformer_engine(shape, CPU, torch.bfloat16)


def said(shape: ModelShape, dtype: torch.dtype = torch.bfloat16, *, fused_gradients: bool = True) -> list[str]:
    return list(kernels_in_use(shape, CUDA, dtype, fused_gradients=fused_gradients))


@without_engine
def test_a_run_on_cuda_says_what_it_does_without(tmp_path: Path) -> None:
    layers, scan, adam, gradients = said(shape_of(tmp_path, "nemotron_h"))
    assert layers.endswith("slower and without FP8: Transformer Engine is not installed")
    assert "plain torch, several times slower than mamba-ssm and causal-conv1d" in scan
    assert adam.startswith("Adam: ") and gradients.startswith("gradients: added to their buffer behind")


def test_a_run_on_cpus_has_one_kind_of_kernels_and_says_nothing(tmp_path: Path) -> None:
    assert not list(kernels_in_use(shape_of(tmp_path, "qwen3"), CPU, torch.float32, fused_gradients=True))


RUN_WITH_BROKEN_ENGINE = """
import sys
from pathlib import Path
import torch
from millrace.config.model_shape import ModelShape
from millrace.megatron import kernels, precision

shape = ModelShape.from_hf(Path(sys.argv[1]))
print(*kernels.kernels_in_use(shape, torch.device("cuda"), torch.bfloat16, fused_gradients=True), sep="\\n")
try:
    precision.require_recipe("blockwise")
except precision.PrecisionError as error:
    print(error)
"""


def test_an_engine_that_does_not_load_is_told_from_one_that_is_absent(tmp_path: Path) -> None:
    """Its outer package imports, as where only its extension for torch is missing."""
    write_checkpoint("qwen3", tmp_path / "qwen3")
    inner = tmp_path / "site" / "transformer_engine" / "pytorch"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").touch()
    (inner / "__init__.py").write_text('raise FileNotFoundError("no shared object file of the torch extension")\n')
    facts = tmp_path / "site" / "transformer_engine-2.9.dist-info" / "METADATA"
    facts.parent.mkdir()
    facts.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.9\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITH_BROKEN_ENGINE, str(tmp_path / "qwen3")],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    layers, *_, refused = done.stdout.splitlines()
    assert "Transformer Engine is installed, but does not load (no shared object file of the torch ext" in layers
    assert "the installed 2.9 does not load (no shared object file" in refused and "precision.fp8=none" in refused


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("transformer_engine.pytorch.optimizers.fused_adam", "Adam: fused, of Transformer Engine"),
        ("apex.optimizers.fused_adam", "Adam: fused, of Apex"),
        (
            "millrace.megatron.adam",
            "Adam: torch's fused kernel; neither Transformer Engine nor NVIDIA's Apex is here",
        ),
    ],
)
def test_the_adam_that_megatron_found_is_named(
    module: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "Adam", type("FusedAdam", (), {"__module__": module}))
    assert sentence in said(shape_of(tmp_path, "qwen3"))


def test_gradients_are_added_inside_the_products_where_apex_can_and_all_weights_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(tmp_path, "qwen3")

    def config(device: torch.device, fused_gradients: bool) -> TransformerConfig:
        return transformer_config(
            shape, ParallelConfig(), TrainerConfig(), torch.bfloat16, device, fused_gradients=fused_gradients
        )

    assert not config(CUDA, True).gradient_accumulation_fusion
    for module in (kernels, model_config):
        monkeypatch.setattr(module, "accumulates_gradients_in_products", lambda: True)
    assert config(CUDA, True).gradient_accumulation_fusion
    assert not config(CUDA, False).gradient_accumulation_fusion and not config(CPU, True).gradient_accumulation_fusion
    assert said(shape)[-1] == "gradients: added to their buffer inside the products (Apex)"
    assert "behind the products" in said(shape, fused_gradients=False)[-1]
