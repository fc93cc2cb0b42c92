import json
from dataclasses import replace
from pathlib import Path

import pytest

from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape

SMALL = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def write(folder: Path, **facts: object) -> Path:
    (folder / "config.json").write_text(json.dumps(SMALL | facts))
    return folder


def dense(folder: Path, **facts: object) -> ModelShape:
    return ModelShape.from_hf(write(folder, **{"architectures": ["Qwen3ForCausalLM"], "head_dim": 32} | facts))


def problems(folder: Path, **facts: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        dense(folder, **facts)
    return caught.value.problems


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_transformers_counts_them(tmp_path: Path, family: str, tied: bool) -> None:
    import torch
    import transformers

    extra = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    facts = SMALL | {"head_dim": 32, "tie_word_embeddings": tied} | (extra if family == "Qwen3Moe" else {})
    config = getattr(transformers, f"{family}Config")(**facts, architectures=[f"{family}ForCausalLM"])
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_hf(tmp_path)
    assert shape.parameter_count() == sum(p.numel() for p in model.parameters())
    assert shape.tied_embeddings is tied
    moe = "experts" if family in ("Qwen3Moe", "Mixtral") else "dense"
    assert [layer.ffn for layer in shape.layers] == [moe, "dense" if family == "Qwen3Moe" else moe, moe, moe]


DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}


@pytest.mark.parametrize("q_rank", [24, None])
def test_latent_attention_and_shared_experts_are_counted_as_transformers_counts_them(
    tmp_path: Path, q_rank: int | None
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(**SMALL | DEEPSEEK | {"q_lora_rank": q_rank})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_hf(tmp_path)
    assert shape.parameter_count() == sum(p.numel() for p in model.parameters())
    idle = 3 * (8 - 4) * shape.layer_parameters(1).expert
    assert shape.active_parameter_count() == shape.parameter_count() - idle - 331 * 64
    assert [layer.ffn for layer in shape.layers] == ["dense", "experts", "experts", "experts"]
    assert (shape.head_dim, shape.num_kv_heads, shape.shared_ffn_hidden_size) == (48, 4, 96)
    assert (shape.expert_groups, shape.groups_per_token, shape.prediction_layers) == (4, 2, 1)


def test_a_token_that_may_choose_from_all_groups_has_no_groups(tmp_path: Path) -> None:
    shape = dense(tmp_path, **DEEPSEEK | {"n_group": 1, "topk_group": 1})
    assert (shape.expert_groups, shape.groups_per_token) == (1, 1)


def test_yarns_numbers_are_complete(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    expected = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32}
    expected |= {"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
    assert dense(tmp_path, **DEEPSEEK, rope_scaling=yarn).rope_scaling == expected
    both = {"mscale": 0.7, "mscale_all_dim": 0.9}
    assert dense(tmp_path, **DEEPSEEK, rope_scaling=yarn | both).rope_scaling == expected | both


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "sparse attention"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "its router"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False with 4 experts a token"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob is True with 1 experts a token"),
        ({"n_group": 3}, "8 experts do not make 3 equal groups"),
        ({"n_group": 8}, "8 experts do not make 8 equal groups of two"),
        ({"topk_group": 8}, "topk_group 8 is larger than n_group 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is larger than the experts in 2 of 4 groups"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim 15 is odd"),
        ({"rope_scaling": {"type": "llama3"}}, "'llama3' is not supported; the types are default, yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings is None"),
        ({"rope_scaling": {"type": "yarn", "attention_factor": 2}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "mscale_all_dim": 1}}, "mscale_all_dim without mscale"),
    ],
)
def test_a_deepseek_v3_that_is_not_built_is_refused(tmp_path: Path, facts: dict[str, object], reason: str) -> None:
    assert any(reason in problem for problem in problems(tmp_path, **DEEPSEEK | facts))


GEMMA = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 32, "sliding_window": 48}


@pytest.mark.parametrize("tied", [False, True])
def test_a_gemma3_is_read_as_transformers_reads_it(tmp_path: Path, tied: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    scaling = {"rope_type": "linear", "factor": 8.0}
    facts = SMALL | GEMMA | {"num_hidden_layers": 8, "tie_word_embeddings": tied, "query_pre_attn_scalar": 168}
    config = Gemma3TextConfig(**facts, rope_scaling=scaling, rope_local_base_freq=2e4)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_hf(tmp_path)
    assert shape.parameter_count() == sum(p.numel() for p in model.parameters())
    assert [layer.window for layer in shape.layers] == [48] * 5 + [None] + [48] * 2
    assert (shape.attention_scale, shape.embedding_scale) == (168**-0.5, 8.0)
    assert (shape.rope_theta, shape.rope_scaling, shape.rope_local_theta) == (1e6, scaling, 2e4)
    # transformers 5 has written layer_types and rope_parameters; releases have the older keys.
    old = facts | {"rope_scaling": scaling, "rope_local_base_freq": 2e4, "sliding_window_pattern": 6}
    assert ModelShape.from_hf(write(tmp_path, **old)) == replace(shape, torch_dtype="float32")


def test_a_gemma3_without_its_defaults_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig

    known = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    (tmp_path / "config.json").write_text(json.dumps(known | {"architectures": ["Gemma3ForCausalLM"]}))
    shape, config = ModelShape.from_hf(tmp_path), Gemma3TextConfig(**known)
    assert (shape.num_kv_heads, shape.head_dim) == (config.num_key_value_heads, config.head_dim)
    assert shape.max_position_embeddings == config.max_position_embeddings
    assert {layer.window for layer in shape.layers} == {config.sliding_window}
    assert shape.attention_scale == config.query_pre_attn_scalar**-0.5
    rope = config.rope_parameters
    assert shape.rope_theta == rope["full_attention"]["rope_theta"]
    assert shape.rope_local_theta == rope["sliding_attention"]["rope_theta"]
    assert shape.tied_embeddings and config.tie_word_embeddings


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "on text alone"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"use_bidirectional_attention": True}, "causal attention only"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"layer_types": ["full_attention"] * 3}, "for each of the 4 layers"),
        ({"layer_types": ["chunked_attention"] * 4}, "sliding_attention or full_attention"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "is scaled"),
    ],
)
def test_a_gemma3_that_is_not_built_is_refused(tmp_path: Path, facts: dict[str, object], reason: str) -> None:
    assert any(reason in problem for problem in problems(tmp_path, **GEMMA | facts))


def test_both_spellings_of_rope_are_read(tmp_path: Path) -> None:
    assert dense(tmp_path, rope_theta=5e5).rope_theta == 5e5
    assert dense(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope_theta == 1e6
    old = dense(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = dense(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old.rope_scaling == new.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert old == new


def test_an_absent_head_dim_follows_the_family(tmp_path: Path) -> None:
    assert dense(tmp_path, head_dim=None).head_dim == 128
    assert ModelShape.from_hf(write(tmp_path, architectures=["LlamaForCausalLM"])).head_dim == 16


def test_the_dtype_is_read_under_its_old_and_new_name(tmp_path: Path) -> None:
    assert dense(tmp_path, torch_dtype="float16").torch_dtype == "float16"
    assert dense(tmp_path, dtype="bfloat16").torch_dtype == "bfloat16"


def test_the_vocabulary_is_padded_to_whole_blocks_on_every_rank(tmp_path: Path) -> None:
    shape = dense(tmp_path)
    assert [shape.padded_vocab_size(tp) for tp in (1, 2, 4)] == [384, 384, 512]
    assert dense(tmp_path, vocab_size=384).padded_vocab_size(2) == 384


def test_every_reason_for_refusal_is_named_at_once(tmp_path: Path) -> None:
    text = "\n".join(problems(tmp_path, use_sliding_window=True, attention_bias=True, hidden_act="gelu", head_dim=31))
    for reason in ("sliding-window", "attention_bias", "gelu", "head_dim 31"):
        assert reason in text
    assert str(tmp_path / "config.json") in text


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported"),
        ({"num_key_value_heads": 3}, "not a multiple of 3"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(tmp_path: Path, facts: dict[str, object], reason: str) -> None:
    assert any(reason in problem for problem in problems(tmp_path, **facts))


def test_a_missing_or_broken_config_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelShape.from_hf(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"a": 1,\n')
    with pytest.raises(ConfigError, match=r"not valid JSON \(line 2"):
        ModelShape.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"),
    [(4, 2, [2, 2]), (5, 2, [3, 2]), (7, 4, [2, 2, 2, 1]), (6, 4, [1, 2, 2, 1]), (61, 8, [7, 8, 8, 8, 8, 8, 7, 7])],
)
def test_pipeline_stages_are_as_even_as_can_be(layers: int, pp: int, sizes: list[int], tmp_path: Path) -> None:
    shape = dense(tmp_path, num_hidden_layers=layers)
    stages = [shape.stage_layers(pp, rank) for rank in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    assert [len(stage) for stage in stages] == sizes
