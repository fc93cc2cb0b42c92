"""Each family's config.json, in the form in which its models are released, and the tensors that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .tokenizer import IM_END, PAD, VOCABULARY

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """`config` holds the keys of config.json beside the common ones; `layer` names one layer's tensors with shapes."""

    config: Config
    layer: Callable[[Config, int], Shapes]
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    tied: bool = False


COMMON: Config = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.02,
    attention_bias=False,
    attention_dropout=0.0,
    use_cache=True,
    bos_token_id=PAD,
    pad_token_id=PAD,
    eos_token_id=IM_END,
)
SILU: Config = dict(hidden_act="silu", rms_norm_eps=1e-6)
# These releases state no head_dim: it is hidden_size / num_attention_heads, and vLLM's CPU attention starts at 32.
WIDE: Config = dict(hidden_size=128)


def config_of(family: str, overrides: Config) -> Config:
    """The whole config.json of a tiny model of `family`, with `overrides` in place of its own values."""
    config = {"model_type": family, **COMMON, **FAMILIES[family].config, **overrides}
    if family == "nemotron_h":
        config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
        if "E" in config["hybrid_override_pattern"]:
            config = {**NEMOTRON_H_EXPERTS, **config}
    return config


def hf_shapes(config: Config) -> Shapes:
    """Name and shape of every tensor of the checkpoint that this config.json describes."""
    family = FAMILIES[config["model_type"]]
    shapes: Shapes = {family.embedding: (config["vocab_size"], config["hidden_size"])}
    for layer in range(config["num_hidden_layers"]):
        shapes.update(family.layer(config, layer))
    shapes[family.final_norm] = (config["hidden_size"],)
    if not config.get("tie_word_embeddings", family.tied):
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    return shapes


def llama_layer(config: Config, layer: int) -> Shapes:
    at = f"model.layers.{layer}."
    return _norms(config, at) | _attention(config, at) | _gated_mlp(config, at + "mlp.", config["intermediate_size"])


def qwen2_layer(config: Config, layer: int) -> Shapes:
    at = f"model.layers.{layer}.self_attn."
    shapes = llama_layer(config, layer)
    return shapes | {at + f"{name}_proj.bias": shapes[at + f"{name}_proj.weight"][:1] for name in "qkv"}


def qwen3_layer(config: Config, layer: int) -> Shapes:
    at = f"model.layers.{layer}."
    mlp = _gated_mlp(config, at + "mlp.", config["intermediate_size"])
    return _norms(config, at) | _attention(config, at) | _head_norms(config, at) | mlp


def qwen3_moe_layer(config: Config, layer: int) -> Shapes:
    at, experts = f"model.layers.{layer}.mlp.", config["num_experts"]
    if layer in config["mlp_only_layers"] or (layer + 1) % config["decoder_sparse_step"]:
        return qwen3_layer(config, layer)
    shapes = {name: shape for name, shape in qwen3_layer(config, layer).items() if not name.startswith(at)}
    shapes[at + "gate.weight"] = (experts, config["hidden_size"])
    for expert in range(experts):
        shapes |= _gated_mlp(config, f"{at}experts.{expert}.", config["moe_intermediate_size"])
    return shapes


def mixtral_layer(config: Config, layer: int) -> Shapes:
    at, hidden, ffn = f"model.layers.{layer}.", config["hidden_size"], config["intermediate_size"]
    shapes = _norms(config, at) | _attention(config, at)
    shapes[at + "block_sparse_moe.gate.weight"] = (config["num_local_experts"], hidden)
    for expert in range(config["num_local_experts"]):
        for name, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
            shapes[f"{at}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes


def gemma3_layer(config: Config, layer: int) -> Shapes:
    at, hidden = f"model.layers.{layer}.", config["hidden_size"]
    around = {at + f"{side}_feedforward_layernorm.weight": (hidden,) for side in ("pre", "post")}
    return qwen3_layer(config, layer) | around


def deepseek_v3_layer(config: Config, layer: int) -> Shapes:
    at, hidden, heads = f"model.layers.{layer}.", config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_rank, kv_rank, q_rows = config["q_lora_rank"], config["kv_lora_rank"], heads * (nope + rope)
    attention: Shapes = {"q_proj.weight": (q_rows, hidden)}
    if q_rank is not None:
        attention = {
            "q_a_proj.weight": (q_rank, hidden),
            "q_a_layernorm.weight": (q_rank,),
            "q_b_proj.weight": (q_rows, q_rank),
        }
    attention |= {
        "kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
        "kv_a_layernorm.weight": (kv_rank,),
        "kv_b_proj.weight": (heads * (nope + value), kv_rank),
        "o_proj.weight": (hidden, heads * value),
    }
    shapes = _norms(config, at) | {at + "self_attn." + name: shape for name, shape in attention.items()}
    if layer < config["first_k_dense_replace"]:
        return shapes | _gated_mlp(config, at + "mlp.", config["intermediate_size"])
    ffn = config["moe_intermediate_size"]
    shapes |= _biased_router(config, at + "mlp.gate.")
    for expert in range(config["n_routed_experts"]):
        shapes |= _gated_mlp(config, f"{at}mlp.experts.{expert}.", ffn)
    return shapes | _gated_mlp(config, at + "mlp.shared_experts.", ffn * config["n_shared_experts"])


def nemotron_h_layer(config: Config, layer: int) -> Shapes:
    at = f"backbone.layers.{layer}."
    mixer = NEMOTRON_H_MIXERS[config["hybrid_override_pattern"][layer]](config, at + "mixer.")
    return {at + "norm.weight": (config["hidden_size"],)} | mixer


def _mamba_mixer(config: Config, at: str) -> Shapes:
    heads, hidden = config["mamba_num_heads"], config["hidden_size"]
    inner = heads * config["mamba_head_dim"]
    convolved = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    return {
        at + "in_proj.weight": (inner + convolved + heads, hidden),
        at + "conv1d.weight": (convolved, 1, config["conv_kernel"]),
        at + "conv1d.bias": (convolved,),
        at + "A_log": (heads,),
        at + "D": (heads,),
        at + "dt_bias": (heads,),
        at + "norm.weight": (inner,),
        at + "out_proj.weight": (hidden, inner),
    }


def _hybrid_attention(config: Config, at: str) -> Shapes:
    return {name.replace("self_attn.", ""): shape for name, shape in _attention(config, at).items()}


def _hybrid_mlp(config: Config, at: str) -> Shapes:
    return _plain_mlp(at, config["hidden_size"], config["intermediate_size"])


def _hybrid_experts(config: Config, at: str) -> Shapes:
    hidden, latent = config["hidden_size"], config.get("moe_latent_size")
    shapes = _biased_router(config, at + "gate.")
    if latent:
        shapes |= {at + "fc1_latent_proj.weight": (latent, hidden), at + "fc2_latent_proj.weight": (hidden, latent)}
    for expert in range(config["n_routed_experts"]):
        shapes |= _plain_mlp(f"{at}experts.{expert}.", latent or hidden, config["moe_intermediate_size"])
    return shapes | _plain_mlp(at + "shared_experts.", hidden, config["moe_shared_expert_intermediate_size"])


def _norms(config: Config, at: str) -> Shapes:
    names = ("input_layernorm", "post_attention_layernorm")
    return {at + f"{name}.weight": (config["hidden_size"],) for name in names}


def _head_norms(config: Config, at: str) -> Shapes:
    return {at + f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}


def _attention(config: Config, at: str) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)
    rows = {"q": heads * head, "k": config["num_key_value_heads"] * head, "v": config["num_key_value_heads"] * head}
    shapes: Shapes = {at + f"self_attn.{name}_proj.weight": (rows[name], hidden) for name in "qkv"}
    return shapes | {at + "self_attn.o_proj.weight": (hidden, heads * head)}


def _gated_mlp(config: Config, at: str, ffn: int) -> Shapes:
    hidden = config["hidden_size"]
    return {
        at + "gate_proj.weight": (ffn, hidden),
        at + "up_proj.weight": (ffn, hidden),
        at + "down_proj.weight": (hidden, ffn),
    }


def _plain_mlp(at: str, hidden: int, ffn: int) -> Shapes:
    return {at + "up_proj.weight": (ffn, hidden), at + "down_proj.weight": (hidden, ffn)}


def _biased_router(config: Config, at: str) -> Shapes:
    experts = config["n_routed_experts"]
    return {at + "weight": (experts, config["hidden_size"]), at + "e_score_correction_bias": (experts,)}


QWEN3: Config = dict(architectures=["Qwen3ForCausalLM"], **SILU, head_dim=32, rope_theta=1000000.0)
QWEN3_MOE: Config = dict(
    architectures=["Qwen3MoeForCausalLM"],
    **SILU,
    head_dim=32,
    rope_theta=1000000.0,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    router_aux_loss_coef=0.0,
)
LLAMA: Config = dict(architectures=["LlamaForCausalLM"], **SILU, head_dim=32, rope_theta=500000.0, mlp_bias=False)
MISTRAL: Config = dict(
    architectures=["MistralForCausalLM"], **SILU, head_dim=32, rope_theta=1000000.0, sliding_window=12
)
QWEN2: Config = dict(
    architectures=["Qwen2ForCausalLM"],
    **SILU,
    **WIDE,
    rope_theta=1000000.0,
    use_sliding_window=False,
    sliding_window=2048,
    max_window_layers=4,
)
MIXTRAL: Config = dict(
    architectures=["MixtralForCausalLM"],
    **SILU,
    **WIDE,
    rope_theta=1000000.0,
    num_local_experts=4,
    num_experts_per_tok=2,
    output_router_logits=False,
    router_aux_loss_coef=0.0,
    sliding_window=None,
)
GEMMA3: Config = dict(
    architectures=["Gemma3ForCausalLM"],
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-6,
    head_dim=32,
    query_pre_attn_scalar=24,
    rope_theta=1000000.0,
    rope_local_base_freq=10000.0,
    rope_scaling=None,
    sliding_window=16,
    sliding_window_pattern=3,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
DEEPSEEK_V3: Config = dict(
    architectures=["DeepseekV3ForCausalLM"],
    **SILU,
    num_hidden_layers=3,
    num_key_value_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=24,
    rope_theta=10000.0,
    rope_scaling=None,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    moe_intermediate_size=64,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    aux_loss_alpha=0.001,
    seq_aux=True,
    num_nextn_predict_layers=0,
    ep_size=1,
    pretraining_tp=1,
)
# A value of `rope_scaling` for deepseek_v3; vLLM has no positions beyond factor * original_max_position_embeddings.
YARN: Config = dict(
    type="yarn",
    factor=8,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=256,
)
NEMOTRON_H: Config = dict(
    architectures=["NemotronHForCausalLM"],
    hybrid_override_pattern="M-*M",
    head_dim=32,
    mlp_hidden_act="relu2",
    mlp_bias=False,
    use_bias=False,
    layer_norm_epsilon=1e-5,
    norm_eps=1e-5,
    mamba_num_heads=8,
    mamba_head_dim=16,
    mamba_hidden_act="silu",
    mamba_proj_bias=False,
    n_groups=2,
    ssm_state_size=16,
    conv_kernel=4,
    use_conv_bias=True,
    chunk_size=32,
    expand=2,
    time_step_min=0.001,
    time_step_max=0.1,
    time_step_floor=1e-4,
    time_step_limit=[0.0, float("inf")],
    rescale_prenorm_residual=True,
    residual_in_fp32=False,
    hidden_dropout=0.0,
    num_logits_to_keep=1,
    partial_rotary_factor=1.0,
    rope_theta=10000,
    sliding_window=None,
    use_mamba_kernels=True,
)
# Added to a hybrid whose pattern holds an E. `moe_latent_size` may be given as well.
NEMOTRON_H_EXPERTS: Config = dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=96,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
NEMOTRON_H_MIXERS: dict[str, Callable[[Config, str], Shapes]] = {
    "M": _mamba_mixer,
    "*": _hybrid_attention,
    "-": _hybrid_mlp,
    "E": _hybrid_experts,
}

FAMILIES: dict[str, Family] = {
    "qwen3": Family(QWEN3, qwen3_layer),
    "qwen3_moe": Family(QWEN3_MOE, qwen3_moe_layer),
    "llama": Family(LLAMA, llama_layer),
    "mistral": Family(MISTRAL, llama_layer),
    "qwen2": Family(QWEN2, qwen2_layer),
    "mixtral": Family(MIXTRAL, mixtral_layer),
    "gemma3_text": Family(GEMMA3, gemma3_layer, tied=True),
    "deepseek_v3": Family(DEEPSEEK_V3, deepseek_v3_layer),
    "nemotron_h": Family(NEMOTRON_H, nemotron_h_layer, "backbone.embeddings.weight", "backbone.norm_f.weight"),
}
