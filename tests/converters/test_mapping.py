"""The mapping of every family: shapes, layouts, and bitwise round trips at several tensor-parallel widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import hf_shapes, write_checkpoint
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import FAMILIES, Mapping, canonical_name, mapping_for
from millrace.converters.safetensors_io import HFReader


def checkpoint(path: Path, family: str, **settings) -> tuple[ModelShape, Mapping, HFReader]:
    write_checkpoint(family, path, **settings)
    shape = ModelShape.from_hf(path)
    return shape, mapping_for(shape), HFReader(path)


def shards_of(mapping: Mapping, reader: HFReader, tp: int, etp: int) -> dict[str, list[Tensor]]:
    """The local tensors of all tensor-parallel ranks, by canonical name."""
    shards = {}
    for entry in mapping:
        width = tp if entry.expert is None else etp
        sources = [reader.lazy(name) for name in entry.hf]
        shards[entry.name] = [entry.to_megatron(sources, width, rank) for rank in range(width)]
    return shards


def exported(mapping: Mapping, shards: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {
        name: tensor
        for entry in mapping
        if not entry.is_copy
        for name, tensor in entry.to_hf(shards[entry.name]).items()
    }


TYING = [(family, tied) for family in FAMILIES for tied in (False, True) if (family, tied) != ("nemotron_h", True)]
"""Families with a head of their own, and with the embedding for a head."""


@pytest.mark.parametrize(("family", "tied"), TYING)
@pytest.mark.parametrize(("tp", "etp"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_a_round_trip_is_bitwise_at_every_width(tmp_path, family, tied, tp, etp):
    _, mapping, reader = checkpoint(
        tmp_path, family, tied=tied, vocab_size=301, num_key_value_heads=4, dtype="bfloat16", num_hidden_layers=2
    )
    shards = shards_of(mapping, reader, tp, etp)
    back = exported(mapping, shards)
    assert back.keys() == set(reader.names)
    for name, tensor in back.items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)
        assert torch.equal(tensor, reader.tensor(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_shard_has_the_announced_shape(tmp_path, family):
    _, mapping, reader = checkpoint(tmp_path, family, vocab_size=301)
    for name, shards in shards_of(mapping, reader, 2, 2).items():
        assert {tuple(shard.shape) for shard in shards} == {mapping[name].local_shape(2)}


@pytest.mark.parametrize(("family", "tied"), TYING)
def test_the_mapping_names_exactly_the_tensors_that_transformers_stores(tmp_path, family, tied):
    overrides = {"mlp_only_layers": [1]} if family == "qwen3_moe" else {}
    _, mapping, reader = checkpoint(tmp_path, family, tied=tied, **overrides)
    assert mapping.hf_shapes() == hf_shapes(json.loads((tmp_path / "config.json").read_text()))
    mapping.check_names(reader.names)


def test_dense_parameters_have_megatrons_names_and_shapes(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "qwen3", num_hidden_layers=1)
    assert {entry.name: entry.local_shape(2) for entry in mapping} == {
        "embedding.word_embeddings.weight": (192, 64),  # 320 rows padded to 384
        "decoder.final_layernorm.weight": (64,),
        "output_layer.weight": (192, 64),
        "decoder.layers.0.input_layernorm.weight": (64,),
        "decoder.layers.0.pre_mlp_layernorm.weight": (64,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (128, 64),
        "decoder.layers.0.self_attention.linear_proj.weight": (64, 64),
        "decoder.layers.0.self_attention.q_layernorm.weight": (32,),
        "decoder.layers.0.self_attention.k_layernorm.weight": (32,),
        "decoder.layers.0.mlp.linear_fc1.weight": (128, 64),
        "decoder.layers.0.mlp.linear_fc2.weight": (64, 64),
    }


def test_latent_attention_and_experts_have_megatrons_names_and_shapes(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=2, n_shared_experts=2, n_routed_experts=8)
    layers = {entry.name: entry.local_shape(2) for entry in mapping if entry.layer is not None and entry.expert is None}
    attention = {
        "input_layernorm.weight": (64,),
        "pre_mlp_layernorm.weight": (64,),
        "self_attention.linear_q_down_proj.weight": (48, 64),
        "self_attention.q_layernorm.weight": (48,),
        "self_attention.linear_q_up_proj.weight": (2 * (32 + 16), 48),
        "self_attention.linear_kv_down_proj.weight": (32 + 16, 64),
        "self_attention.kv_layernorm.weight": (32,),
        "self_attention.linear_kv_up_proj.weight": (2 * (32 + 24), 32),
        "self_attention.linear_proj.weight": (64, 2 * 24),
    }
    dense = {"mlp.linear_fc1.weight": (128, 64), "mlp.linear_fc2.weight": (64, 64)}
    experts = {
        "mlp.router.weight": (8, 64),
        "mlp.router.expert_bias": (8,),
        "mlp.shared_experts.linear_fc1.weight": (128, 64),
        "mlp.shared_experts.linear_fc2.weight": (64, 64),
    }
    expected = [attention | dense, attention | experts]
    assert layers == {f"decoder.layers.{n}.{name}": s for n in (0, 1) for name, s in expected[n].items()}
    assert mapping["decoder.layers.1.mlp.router.expert_bias"].dtype == torch.float32
    assert {entry.expert for entry in mapping if entry.layer == 1} == {None, *range(8)}


def test_queries_without_a_latent_are_one_projection(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "deepseek_v3", q_lora_rank=None)
    entry = mapping["decoder.layers.0.self_attention.linear_q_proj.weight"]
    assert entry.hf == {"model.layers.0.self_attn.q_proj.weight": (4 * (32 + 16), 64)}
    assert "decoder.layers.0.self_attention.linear_q_up_proj.weight" not in mapping


def test_a_head_of_latent_attention_stays_on_one_rank(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "deepseek_v3")
    entry = mapping["decoder.layers.0.self_attention.linear_kv_up_proj.weight"]
    heads = torch.arange(4).repeat_interleave(32 + 24)[:, None].expand(4 * 56, 32)
    assert entry.to_megatron([heads], 2, 1)[:, 0].unique().tolist() == [2, 3]


def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    _, mapping, reader = checkpoint(tmp_path, "deepseek_v3", num_nextn_predict_layers=1)
    behind = ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"]
    mapping.check_names([*reader.names, *behind])
    assert mapping.unread_names([*reader.names, *behind]) == behind
    with pytest.raises(ConversionError, match=r"holds model.layers.4.eh_proj.weight"):
        mapping.check_names([*reader.names, "model.layers.4.eh_proj.weight"])
    _, without, _ = checkpoint(tmp_path, "deepseek_v3")
    with pytest.raises(ConversionError, match=r"holds model.layers.3.eh_proj.weight"):
        without.check_names([*reader.names, behind[0]])


def test_queries_keys_and_values_are_interleaved_per_group(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "qwen3", num_hidden_layers=1)
    entry = mapping["decoder.layers.0.self_attention.linear_qkv.weight"]
    q = torch.arange(4).repeat_interleave(32)[:, None].expand(128, 64)  # the head's number in each row
    k = q[:64] + 10
    v = q[:64] + 20
    rows = entry.to_megatron([q, k, v])[::32, 0]
    assert rows.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert entry.to_megatron([q, k, v], 2, 1)[::32, 0].tolist() == [2, 3, 11, 21]


def test_gate_and_up_stand_together_on_every_rank(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "llama", num_hidden_layers=1)
    entry = mapping["decoder.layers.0.mlp.linear_fc1.weight"]
    gate = torch.arange(128)[:, None].expand(128, 64)
    shard = entry.to_megatron([gate, gate + 1000], 2, 1)
    assert shard[:, 0].tolist() == [*range(64, 128), *range(1064, 1128)]


def test_vocabulary_padding_is_zero_and_never_exported(tmp_path):
    _, mapping, reader = checkpoint(tmp_path, "llama", vocab_size=130)
    entry = mapping["embedding.word_embeddings.weight"]
    shards = [entry.to_megatron([reader.lazy("model.embed_tokens.weight")], 4, rank) for rank in range(4)]
    assert [tuple(shard.shape) for shard in shards] == [(64, 64)] * 4
    assert torch.count_nonzero(shards[2][2:]) == 0 and torch.count_nonzero(shards[3]) == 0
    shards[3].fill_(7)
    assert entry.to_hf(shards)["model.embed_tokens.weight"].shape == (130, 64)


def test_a_tied_model_fills_its_last_stage_from_the_embedding(tmp_path):
    _, mapping, reader = checkpoint(tmp_path, "qwen3", tied=True)
    output = mapping["output_layer.weight"]
    assert output.is_copy and "lm_head.weight" not in mapping.hf_shapes()
    filled = output.to_megatron([reader.lazy(name) for name in output.hf])
    assert torch.equal(filled[:320], reader.tensor("model.embed_tokens.weight"))
    mapping.check_names([*reader.names, "lm_head.weight"])


def test_the_names_of_both_layer_specs_lead_to_one_canonical_name():
    spelled = {
        "module.module.decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": (
            "decoder.layers.5.input_layernorm.weight"
        ),
        "decoder.layers.1.input_layernorm.weight": "decoder.layers.5.input_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "decoder.layers.4.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight": (
            "decoder.layers.4.mlp.experts.11.linear_fc1.weight"
        ),
        "decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight": (
            "decoder.layers.4.self_attention.q_layernorm.weight"
        ),
        "decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight": (
            "decoder.layers.4.self_attention.kv_layernorm.weight"
        ),
        "decoder.layers.0.mlp.experts.linear_fc2.weight3": "decoder.layers.4.mlp.experts.11.linear_fc2.weight",
        "decoder.layers.1.mixer.in_proj.layer_norm_weight": "decoder.layers.5.norm.weight",
        "decoder.layers.1.mixer.conv1d_bias": "decoder.layers.5.mixer.conv1d.bias",
        "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    }
    for local, canonical in spelled.items():
        assert canonical_name(local, layers=[4, 5], expert_offset=8) == canonical


def test_a_tensor_of_another_shape_is_named(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "llama")
    with pytest.raises(ConversionError, match=r"model.norm.weight has shape \[32\].* asks for \[64\]"):
        mapping["decoder.final_layernorm.weight"].to_megatron([torch.zeros(32)])


def test_a_shard_of_another_shape_is_named_with_its_rank(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "llama")
    with pytest.raises(ConversionError, match=r"linear_fc2.weight has shape \[64, 63\] on rank 1 of 2"):
        mapping["decoder.layers.0.mlp.linear_fc2.weight"].to_hf([torch.zeros(64, 64), torch.zeros(64, 63)])


def test_too_many_ranks_for_the_key_value_groups_are_refused(tmp_path):
    _, mapping, reader = checkpoint(tmp_path, "qwen3")
    entry = mapping["decoder.layers.0.self_attention.linear_qkv.weight"]
    with pytest.raises(ConversionError, match=r"linear_qkv.weight: 2 key/value groups cannot be cut evenly over 4"):
        entry.to_megatron([reader.lazy(name) for name in entry.hf], 4, 0)


def test_missing_and_left_over_tensors_are_named(tmp_path):
    _, mapping, reader = checkpoint(tmp_path, "qwen3")
    names = [name for name in reader.names if "q_norm" not in name]
    with pytest.raises(ConversionError, match=r"lacks model.layers.0.self_attn.q_norm.weight and 3 more tensors"):
        mapping.check_names(names)
    with pytest.raises(ConversionError, match=r"holds score.weight"):
        mapping.check_names([*reader.names, "score.weight"])


def test_an_unknown_parameter_and_an_unknown_family_are_refused(tmp_path):
    shape, mapping, _ = checkpoint(tmp_path, "qwen3")
    with pytest.raises(ConversionError, match=r"no line"):
        mapping["decoder.layers.0.mlp.shared_experts.linear_fc1.weight"]
    object.__setattr__(shape, "family", "gpt2")
    with pytest.raises(ConversionError, match=r"'gpt2' is not known; known are llama, mistral"):
        mapping_for(shape)


HYBRID = {"hybrid_override_pattern": "ME*-ME"}


@pytest.mark.parametrize("latent", [{}, {"moe_latent_size": 32}])
@pytest.mark.parametrize(("tp", "etp"), [(1, 1), (2, 1), (2, 2)])
def test_a_hybrid_round_trip_is_bitwise_and_keeps_the_routers_bias_in_float32(tmp_path, tp, etp, latent):
    _, mapping, reader = checkpoint(tmp_path, "nemotron_h", dtype="bfloat16", vocab_size=301, **HYBRID, **latent)
    back = exported(mapping, shards_of(mapping, reader, tp, etp))
    assert back.keys() == set(reader.names)
    for name, tensor in back.items():
        assert tensor.dtype == (torch.float32 if "e_score_correction" in name else torch.bfloat16), name
        assert torch.equal(tensor, reader.tensor(name)), name


def test_every_layer_of_a_hybrid_is_the_part_that_its_letter_says(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "nemotron_h", **HYBRID, moe_latent_size=32)
    of_layer = {layer: {} for layer in range(6)}
    for entry in mapping:
        if entry.layer is not None and (entry.expert or 0) == 0:
            of_layer[entry.layer][entry.name.split(".", 3)[3]] = entry.local_shape(2 if entry.expert is None else 1)
    assert of_layer[0] == {
        "norm.weight": (64,),
        "mixer.in_proj.weight": (164, 64),  # 64 of z, 64 of x, 16 of B, 16 of C, 4 time steps
        "mixer.conv1d.weight": (96, 1, 4),
        "mixer.conv1d.bias": (96,),
        "mixer.dt_bias": (4,),
        "mixer.A_log": (4,),
        "mixer.D": (4,),
        "mixer.norm.weight": (64,),
        "mixer.out_proj.weight": (64, 64),
    }
    assert of_layer[1] == {
        "pre_mlp_layernorm.weight": (64,),
        "mlp.router.weight": (8, 64),
        "mlp.router.expert_bias": (8,),
        "mlp.shared_experts.linear_fc1.weight": (48, 64),
        "mlp.shared_experts.linear_fc2.weight": (64, 48),
        "mlp.fc1_latent_proj.weight": (32, 64),
        "mlp.fc2_latent_proj.weight": (64, 32),
        "mlp.experts.0.linear_fc1.weight": (64, 32),
        "mlp.experts.0.linear_fc2.weight": (32, 64),
    }
    assert list(of_layer[2]) == [
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
    ]
    assert list(of_layer[3]) == ["pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    assert (of_layer[4], of_layer[5]) == (of_layer[0], of_layer[1])


def test_each_part_of_a_mamba_projection_is_cut_by_itself(tmp_path):
    _, mapping, _ = checkpoint(tmp_path, "nemotron_h")
    rows = torch.arange(328)[:, None].expand(328, 64)
    shard = mapping["decoder.layers.0.mixer.in_proj.weight"].to_megatron([rows], 2, 1)[:, 0].tolist()
    parts = [(64, 128), (192, 256), (272, 288), (304, 320), (324, 328)]
    assert shard == [row for first, last in parts for row in range(first, last)]
