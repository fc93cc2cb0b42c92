"""LoRA adapters as entries of the mapping: names, cuts, and what PEFT's files may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint

from millrace.config.linears import linear_names, linears
from millrace.config.model_shape import ModelShape
from millrace.converters.adapters import (
    ALL_LINEAR,
    adapter_entries,
    hf_modules,
    is_linear,
    merge_adapter,
    read_adapter_config,
    scaling,
)
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import FAMILIES, mapping_for
from millrace.converters.safetensors_io import HFReader

CHECKPOINTS = {family: {"family": family} for family in FAMILIES}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelShape]:
    root = tmp_path_factory.mktemp("models")
    return {name: ModelShape.from_hf(write_checkpoint(path=root / name, **o)) for name, o in CHECKPOINTS.items()}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_count_without_torch_agrees_with_the_mapping(family: str, shapes: dict[str, ModelShape]) -> None:
    shape = shapes[family]
    expected: list[tuple[Any, ...]] = []
    for entry in mapping_for(shape):
        if is_linear(entry) and not entry.expert:  # of the experts the first stands for all
            row, expert = entry.rule.kind == "row", entry.expert is not None
            for module, size in zip(hf_modules(entry), entry.hf.values(), strict=True):
                expected.append((entry.layer, module.rsplit(".", 1)[-1], size[1], size[0], row, expert))
    counted = [
        (layer, linear.name, linear.inputs, linear.outputs, linear.row, linear.expert)
        for layer in range(shape.num_layers)
        for linear in linears(shape, layer)
    ]
    assert sorted(counted) == sorted(expected)


@pytest.mark.parametrize("family", CHECKPOINTS)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_cut_adapter_multiplies_to_the_cut_product(family: str, tp: int, shapes: dict[str, ModelShape]) -> None:
    """For each base weight: its shard of s * B A equals what the shards of the factors give."""
    generator = torch.Generator().manual_seed(0)
    for adapter in adapter_entries(mapping_for(shapes[family]), 3, {ALL_LINEAR}).values():
        a = [torch.randn(shape, generator=generator) for shape in adapter.a.hf.values()]
        b = [torch.randn(shape, generator=generator) for shape in adapter.b.hf.values()]
        products = [y @ x for x, y in zip(a, b, strict=True)]
        for rank in range(tp):
            local_a, local_b = adapter.a.to_megatron(a, tp, rank), adapter.b.to_megatron(b, tp, rank)
            owners = adapter.row_owners(tp, rank)
            rows = local_a.unflatten(0, (len(a), 3))[owners]
            found = (local_b[:, :, None] * rows).sum(dim=1)
            expected = adapter.base.to_megatron(products, tp, rank)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_some_targets_of_a_fused_weight_leave_the_others_alone(shapes: dict[str, ModelShape]) -> None:
    entries = adapter_entries(mapping_for(shapes["qwen3"]), 2, ["q_proj", "v_proj"])
    adapter = entries["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert adapter.modules == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    assert list(adapter.b.hf)[1] == "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    owners = adapter.row_owners(2, 1).tolist()
    head = shapes["qwen3"].head_dim
    assert owners == [0] * 2 * head + [-1] * head + [1] * head  # two queries, a key and a value a group
    assert len(entries) == shapes["qwen3"].num_layers


def test_an_unknown_target_is_named_with_those_there_are(shapes: dict[str, ModelShape]) -> None:
    with pytest.raises(ConversionError, match="no linear layer c_attn; it has down_proj, gate_proj, k_proj"):
        adapter_entries(mapping_for(shapes["llama"]), 2, ["q_proj", "c_attn"])


def test_neither_router_nor_embedding_is_a_linear(shapes: dict[str, ModelShape]) -> None:
    assert linear_names(shapes["qwen3_moe"]) == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip


def test_rank_stabilised_scaling_falls_with_the_root_of_the_rank() -> None:
    assert scaling(16, 32, rank_stabilised=False) == 2.0
    assert scaling(16, 32, rank_stabilised=True) == 8.0


PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]}


def write_adapter(folder: Path, factors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapters_settings_are_read(tmp_path: Path) -> None:
    settings = read_adapter_config(write_adapter(tmp_path / "a", {}, use_rslora=True, lora_dropout=0.1))
    assert (settings.rank, settings.alpha, settings.rank_stabilised) == (2, 4.0, True)
    assert settings.targets == ("q_proj", "v_proj") and settings.dropout == 0.1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "only adapters of peft_type LORA"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"target_modules": None}, "target_modules"),
        ({"r": "two"}, "r and lora_alpha"),
    ],
)
def test_what_is_not_plain_lora_is_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=says):
        read_adapter_config(write_adapter(tmp_path / "a", {}, **config))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="does not exist: an adapter is a folder"):
        read_adapter_config(tmp_path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def test_merging_changes_the_adapted_weights_alone(tmp_path: Path) -> None:
    hf = write_checkpoint("qwen3", tmp_path / "hf", num_hidden_layers=1)
    base = load_file(hf / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    outputs, inputs = base[name].shape
    a, b = torch.randn(2, inputs), torch.randn(outputs, 2)
    adapter = write_adapter(tmp_path / "a", {f"{Q}A.weight": a, f"{Q}B.weight": b})
    merged = HFReader(merge_adapter(hf, adapter, tmp_path / "out"))
    for key, tensor in base.items():
        expected = tensor if key != name else tensor.double() + 2 * b.double() @ a.double()
        torch.testing.assert_close(merged.tensor(key).double(), expected.double(), atol=1e-6, rtol=1e-6)
        assert key == name or torch.equal(merged.tensor(key), tensor)


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"A": (2, 64)}, "not both factors"),
        ({"A": (2, 32), "B": (128, 2)}, "q_proj.weight has shape"),
        ({"A": (2, 64), "B": (128, 2), "other": (2, 2)}, "holds .*other"),
    ],
)
def test_factors_that_do_not_fit_are_named(factors: dict[str, Any], says: str, tmp_path: Path) -> None:
    hf = write_checkpoint("qwen3", tmp_path / "hf", num_hidden_layers=1)
    tensors = {f"{Q}{which}.weight": torch.zeros(shape) for which, shape in factors.items()}
    with pytest.raises(ConversionError, match=says):
        merge_adapter(hf, write_adapter(tmp_path / "a", tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()
