"""Hugging Face's config.json, family by family: from its keys to a `ModelShape`.

A family is one function. Defaults of keys that a config.json leaves out are those of the transformers classes of the
family. What Millrace does not build is refused here, all of it at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from millrace.config.errors import ConfigError
from millrace.config.model_shape import Activation, LatentAttentionShape, LayerShape, MambaShape, ModelShape

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh"}


def read_model_shape(path: Path) -> ModelShape:
    """Read `path`, a checkpoint's folder or its config.json. Raises ConfigError naming every problem."""
    file, facts = _read(path)
    family = _family(file, facts)
    config = HFConfig(file, facts, family)
    shape = _READERS[family](config)
    config.check(shape)
    if config.problems:
        raise ConfigError(config.problems)
    return shape


# ---- families --------------------------------------------------------------------------------------------------------


def _llama(config: HFConfig) -> ModelShape:
    config.refuse_true("attention_bias", "mlp_bias")
    return _decoder(config, positions=2048)


def _mistral(config: HFConfig) -> ModelShape:
    windowed = config.facts.get("sliding_window", 4096) is not None
    layer = LayerShape(window=config.size("sliding_window", 4096) if windowed else None)
    return _decoder(config, positions=131072, kv_heads=8, layers=(layer,) * config.size("num_hidden_layers"))


def _qwen2(config: HFConfig) -> ModelShape:
    return _decoder(config, positions=32768, attention_bias=True)


def _qwen3(config: HFConfig) -> ModelShape:
    config.refuse_true("attention_bias")
    return _decoder(config, positions=32768, head_dim=128, qk_norm=True)


def _qwen3_moe(config: HFConfig) -> ModelShape:
    config.refuse_true("attention_bias")
    step, dense = config.size("decoder_sparse_step", 1), config.facts.get("mlp_only_layers") or []
    sparse = [n not in dense and (n + 1) % step == 0 for n in range(config.size("num_hidden_layers"))]
    return _decoder(
        config,
        positions=32768,
        layers=tuple(LayerShape(ffn="experts" if moe else "dense") for moe in sparse),
        qk_norm=True,
        # transformers 5 writes num_local_experts, transformers 4 wrote num_experts.
        num_experts=config.size("num_experts" if "num_experts" in config.facts else "num_local_experts", 128),
        experts_per_token=config.size("num_experts_per_tok", 8),
        moe_ffn_hidden_size=config.size("moe_intermediate_size"),
        norm_topk_prob=config.flag("norm_topk_prob"),
    )


def _mixtral(config: HFConfig) -> ModelShape:
    if config.facts.get("sliding_window"):
        config.problem("sliding-window attention is in use; a mixtral is built with full attention only")
    return _decoder(
        config,
        positions=131072,
        layers=(LayerShape(ffn="experts"),) * config.size("num_hidden_layers"),
        num_experts=config.size("num_local_experts", 8),
        experts_per_token=config.size("num_experts_per_tok", 2),
        moe_ffn_hidden_size=config.size("intermediate_size"),
        norm_topk_prob=True,
        default_eps=1e-5,
    )


def _gemma3_text(config: HFConfig) -> ModelShape:
    config.refuse_true("attention_bias")
    if config.facts.get("use_bidirectional_attention"):
        config.problem("use_bidirectional_attention is true; a gemma3_text is built with causal attention only")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.facts.get(key) is not None:
            config.problem(f"{key} is {config.facts[key]!r}; a gemma3_text is built without soft-capping only")
    local_theta, local_scaling = config.rope(layers="sliding_attention", theta_key="rope_local_base_freq")
    if local_scaling is not None:
        config.problem("the RoPE of the layers with a window is scaled; a gemma3_text is built with a plain one only")
    score_divisor = config.number("query_pre_attn_scalar", 256)
    if score_divisor <= 0:
        config.problem(f"query_pre_attn_scalar is {score_divisor:g}; scores are divided by its square root")
        score_divisor = 256
    return _decoder(
        config,
        positions=131072,
        head_dim=256,
        kv_heads=4,
        layers=_layers_with_windows(config),
        default_theta=1e6,
        tied=True,
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",)),
        qk_norm=True,
        attention_scale=score_divisor**-0.5,
        rope_local_theta=local_theta,
        embedding_scale=config.size("hidden_size") ** 0.5,
        zero_centered_norms=True,
        sandwich_norms=True,
    )


def _layers_with_windows(config: HFConfig) -> tuple[LayerShape, ...]:
    """Dense layers, whose attention has a window where `layer_types` says so; without it every
    `sliding_window_pattern`-th layer has none."""
    number, window = config.size("num_hidden_layers"), config.size("sliding_window", 4096)
    known, kinds = ("sliding_attention", "full_attention"), config.facts.get("layer_types")
    if kinds is None:
        pattern = config.size("sliding_window_pattern", 6)
        kinds = ["sliding_attention" if (n + 1) % pattern else "full_attention" for n in range(number)]
    if not isinstance(kinds, list) or len(kinds) != number or any(kind not in known for kind in kinds):
        config.problem(f"layer_types must name {' or '.join(known)} for each of the {number} layers")
        return (LayerShape(),) * number
    return tuple(LayerShape(window=window if kind == "sliding_attention" else None) for kind in kinds)


def _deepseek_v3(config: HFConfig) -> ModelShape:
    config.refuse_true("attention_bias")
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    config.require("moe_layer_freq", 1)
    config.require("rope_interleave", True)
    latent = _latent_attention(config)
    layers, dense = config.size("num_hidden_layers"), config.count("first_k_dense_replace", 3)
    width = config.size("moe_intermediate_size", 2048)
    groups, chosen = config.groups(8, 4, experts=config.size("n_routed_experts", 256))
    shape = _decoder(
        config,
        positions=4096,
        rope_types=("default", "yarn"),
        layers=tuple(LayerShape(ffn="dense" if n < dense else "experts") for n in range(layers)),
        latent_attention=latent,
        num_experts=config.size("n_routed_experts", 256),
        experts_per_token=config.size("num_experts_per_tok", 8),
        moe_ffn_hidden_size=width,
        shared_ffn_hidden_size=width * config.size("n_shared_experts", 1),
        norm_topk_prob=config.flag("norm_topk_prob", True),
        router_score="sigmoid",
        router_bias=True,
        router_scale=config.number("routed_scaling_factor", 2.5),
        expert_groups=groups,
        groups_per_token=chosen,
        prediction_layers=config.count("num_nextn_predict_layers", 0),
    )
    if shape.num_kv_heads != shape.num_heads:
        config.problem(
            f"num_key_value_heads is {shape.num_kv_heads}; latent attention has a key for each of the "
            f"{shape.num_heads} heads"
        )
    # config.json may call the rotated part of a head head_dim.
    return replace(
        shape,
        head_dim=latent.nope_dim + latent.rope_dim,
        num_kv_heads=shape.num_heads,
        rope_scaling=_yarn(config, shape.rope_scaling),
    )


def _latent_attention(config: HFConfig) -> LatentAttentionShape:
    full_queries = "q_lora_rank" in config.facts and config.facts["q_lora_rank"] is None
    latent = LatentAttentionShape(
        q_rank=None if full_queries else config.size("q_lora_rank", 1536),
        kv_rank=config.size("kv_lora_rank", 512),
        nope_dim=config.size("qk_nope_head_dim", 128),
        rope_dim=config.size("qk_rope_head_dim", 64),
        v_dim=config.size("v_head_dim", 128),
    )
    if latent.rope_dim % 2:
        config.problem(f"qk_rope_head_dim {latent.rope_dim} is odd; RoPE needs an even one")
    return latent


def _yarn(config: HFConfig, scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """YaRN's numbers, all of them present, with the meaning that transformers gives to those left out."""
    if scaling is None:
        return None
    for key in ("factor", "original_max_position_embeddings"):
        if not isinstance(scaling.get(key), int | float):
            config.problem(f"YaRN's {key} is {scaling.get(key)!r}; it must be a number")
    if scaling.get("attention_factor") is not None or not scaling.get("truncate", True):
        config.problem("YaRN with attention_factor or truncate=false is not built for a deepseek_v3; remove the key")
    mscale, of_all = scaling.get("mscale") or 0.0, scaling.get("mscale_all_dim") or 0.0
    if of_all and not mscale:
        config.problem("YaRN's mscale_all_dim without mscale is not built; a deepseek_v3 states both or neither")
    return {
        "rope_type": "yarn",
        "factor": scaling.get("factor"),
        "original_max_position_embeddings": scaling.get("original_max_position_embeddings"),
        "beta_fast": scaling.get("beta_fast") or 32,
        "beta_slow": scaling.get("beta_slow") or 1,
        "mscale": mscale if of_all else 1.0,
        "mscale_all_dim": of_all,
    }


HYBRID_LAYERS = {
    "M": LayerShape(mixer="mamba", ffn=None),
    "*": LayerShape(mixer="attention", ffn=None),
    "-": LayerShape(mixer=None, ffn="dense"),
    "E": LayerShape(mixer=None, ffn="experts"),
}
HYBRID_NAMES = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}
"""What transformers writes instead of the pattern's letters, in its present and its earlier spelling."""


def _nemotron_h(config: HFConfig) -> ModelShape:
    layers = tuple(HYBRID_LAYERS[letter] for letter in _hybrid_pattern(config))
    config.refuse_true("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias")
    _refuse_unbuilt_hybrid(config)
    heads = config.size("num_attention_heads", 32)
    return ModelShape(
        family=config.family,
        layers=layers,
        hidden_size=config.size("hidden_size", 4096),
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", 8),
        head_dim=config.size("head_dim", 128),
        ffn_hidden_size=config.size("intermediate_size", 21504),
        vocab_size=config.size("vocab_size", 131072),
        tied_embeddings=False,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        max_position_embeddings=config.size("max_position_embeddings", 4096),
        torch_dtype=config.torch_dtype(),
        activation=config.activation("mlp_hidden_act", "relu2", ("relu2", "silu")),
        gated=False,
        position="none",
        mamba=_mamba(config) if HYBRID_LAYERS["M"] in layers else None,
        **(_hybrid_experts(config) if HYBRID_LAYERS["E"] in layers else {}),
    )


def _hybrid_pattern(config: HFConfig) -> str:
    """A letter for each layer, from the released spelling (`hybrid_override_pattern`) or that of transformers 5."""
    pattern = config.facts.get("hybrid_override_pattern")
    key = "hybrid_override_pattern" if pattern is not None else "layers_block_type"
    if pattern is None:
        pattern = config.facts.get(key) or config.facts.get("layer_types")
        if isinstance(pattern, list):
            pattern = [HYBRID_NAMES.get(name, str(name)) for name in pattern]
    if not pattern or not isinstance(pattern, str | list):
        config.problem(
            f"{key} is {'missing' if pattern is None else repr(pattern)}; it must name the part of each layer"
        )
        return "M"
    if wrong := [letter for letter in pattern if letter not in HYBRID_LAYERS]:
        known = ", ".join(HYBRID_LAYERS) if key == "hybrid_override_pattern" else ", ".join(HYBRID_NAMES)
        config.problem(f"{key} names a layer {wrong[0]!r}; a {config.family} has layers of {known}")
    count = config.facts.get("num_hidden_layers", len(pattern))
    if count != len(pattern):
        config.problem(f"num_hidden_layers is {count!r}, but {key} names {len(pattern)} layers")
    return "".join(letter for letter in pattern if letter in HYBRID_LAYERS) or "M"


def _mamba(config: HFConfig) -> MambaShape:
    mamba = MambaShape(
        heads=config.size("mamba_num_heads", 128),
        head_dim=config.size("mamba_head_dim", 64),
        groups=config.size("n_groups", 8),
        state=config.size("ssm_state_size", 128),
        conv_kernel=config.size("conv_kernel", 4),
        chunk=config.size("chunk_size", 128),
    )
    config.activation("mamba_hidden_act", "silu")
    if mamba.heads % mamba.groups:
        config.problem(f"mamba_num_heads {mamba.heads} is not a multiple of n_groups {mamba.groups}")
    if not config.flag("use_conv_bias", True):
        config.problem("use_conv_bias is false; the convolution of a Mamba layer is built with a bias only")
    limit = config.facts.get("time_step_limit")
    if limit is not None and [_number_or_infinity(bound) for bound in limit] != [0.0, math.inf]:
        config.problem(
            f"time_step_limit is {limit}; time steps are built without a limit only, as Megatron-Core and vLLM do"
        )
    return mamba


def _number_or_infinity(value: Any) -> Any:
    """transformers 5 writes {"__float__": "Infinity"} for what JSON has no number for."""
    return float(value["__float__"]) if isinstance(value, dict) and "__float__" in value else value


def _hybrid_experts(config: HFConfig) -> dict[str, Any]:
    per_token, experts = config.size("num_experts_per_tok", 2), config.size("n_routed_experts", 8)
    groups, groups_per_token = config.groups(1, 1, experts=experts)
    if config.size("n_shared_experts", 1) != 1:
        config.problem(
            f"n_shared_experts is {config.facts['n_shared_experts']}; a {config.family} is built with one shared "
            "expert of the width moe_shared_expert_intermediate_size only"
        )
    return {
        "num_experts": experts,
        "experts_per_token": per_token,
        "moe_ffn_hidden_size": config.size("moe_intermediate_size", 7688),
        "shared_ffn_hidden_size": config.size("moe_shared_expert_intermediate_size", 7688),
        "moe_latent_size": config.size("moe_latent_size") if config.facts.get("moe_latent_size") else 0,
        "norm_topk_prob": config.flag("norm_topk_prob", True),
        "router_score": "sigmoid",
        "router_bias": True,
        "router_scale": config.number("routed_scaling_factor", 1.0),
        "expert_groups": groups,
        "groups_per_token": groups_per_token,
    }


def _refuse_unbuilt_hybrid(config: HFConfig) -> None:
    if config.flag("residual_in_fp32"):
        config.problem("residual_in_fp32 is true; residuals are built in the model's data type only")
    if config.facts.get("sliding_window"):
        config.problem(f"sliding-window attention is in use; a {config.family} is built with full attention only")
    if config.flag("tie_word_embeddings"):
        config.problem("tie_word_embeddings is true; transformers and vLLM give this family a head of its own always")
    if config.facts.get("num_nextn_predict_layers"):
        config.problem("num_nextn_predict_layers is not 0; layers that predict several tokens are not built")


def _decoder(
    config: HFConfig,
    *,
    positions: int,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    layers: tuple[LayerShape, ...] | None = None,
    default_eps: float = 1e-6,
    rope_types: tuple[str, ...] = ("default", "linear", "llama3"),
    default_theta: float = 1e4,
    tied: bool = False,
    activation: Activation | None = None,
    **own: Any,
) -> ModelShape:
    """A decoder of attention and feed-forward layers; `own` are the fields that its family sets otherwise."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    theta, scaling = config.rope(rope_types, default_theta=default_theta)
    if not any(layer.window for layer in layers or ()):
        config.refuse_sliding_window()
    return ModelShape(
        family=config.family,
        layers=layers or (LayerShape(),) * config.size("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", kv_heads or heads),
        head_dim=config.size("head_dim", head_dim or max(hidden // heads, 1)),
        ffn_hidden_size=config.size("intermediate_size"),
        vocab_size=config.size("vocab_size"),
        tied_embeddings=config.flag("tie_word_embeddings", tied),
        norm_eps=config.number("rms_norm_eps", default_eps),
        max_position_embeddings=config.size("max_position_embeddings", positions),
        torch_dtype=config.torch_dtype(),
        activation=activation or config.activation("hidden_act", "silu"),
        rope_theta=theta,
        rope_scaling=scaling,
        **own,
    )


_READERS: dict[str, Callable[[HFConfig], ModelShape]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "gemma3_text": _gemma3_text,
    "nemotron_h": _nemotron_h,
}
"""Family, which is also transformers' model_type -> its function."""

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Gemma3ForCausalLM": "gemma3_text",
    "NemotronHForCausalLM": "nemotron_h",
}
"""What config.json names in `architectures` -> family."""

NOT_BUILT = {
    "DeepseekV32ForCausalLM": "its sparse attention (each query attends to the tokens that an indexer picks) takes no "
    "packed sequences in Megatron-Core, and Millrace trains on packed sequences; start from a "
    "DeepseekV3ForCausalLM such as V3, R1 or V3.1",
    "DeepseekV2ForCausalLM": "its router (softmax scores, groups by their best expert) is not built; start from a "
    "DeepseekV3ForCausalLM",
    "Gemma3ForConditionalGeneration": "Millrace trains on text alone; with transformers make a Gemma3ForCausalLM of "
    "its text_config and its model.language_model, and start from that",
}
"""Close relatives of supported architectures -> why they are refused."""


# ---- reading ---------------------------------------------------------------------------------------------------------


class HFConfig:
    """Takes facts out of a config.json and collects what is wrong with them."""

    def __init__(self, file: Path, facts: Mapping[str, Any], family: str) -> None:
        self.file = file
        self.facts = facts
        self.family = family
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        message = f"{self.file}: {text}"
        if message not in self.problems:
            self.problems.append(message)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.facts.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.problem(
            f"{key} is {'missing' if value is None else repr(value)}; a {self.family} needs a positive integer"
        )
        return 1

    def count(self, key: str, default: int) -> int:
        """Like `size`, and 0 is allowed."""
        return 0 if self.facts.get(key, default) in (0, None) else self.size(key, default)

    def number(self, key: str, default: float) -> float:
        value = self.facts.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        self.problem(f"{key} must be a number, not {value!r}")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.facts.get(key, default))

    def torch_dtype(self) -> str:
        return str(self.facts.get("dtype") or self.facts.get("torch_dtype") or "float32")

    def activation(self, key: str, default: str, supported: tuple[str, ...] = ("silu",)) -> Activation:
        name = self.facts.get(key) or default
        if name not in supported:
            self.problem(f"{key} is {name!r}; a {self.family} is built with {' or '.join(supported)} only")
            name = supported[0]
        return ACTIVATIONS[name]

    def rope(
        self,
        supported: tuple[str, ...] = ("default", "linear", "llama3"),
        *,
        layers: str = "full_attention",
        theta_key: str = "rope_theta",
        default_theta: float = 1e4,
    ) -> tuple[float, dict[str, Any] | None]:
        """RoPE base and scaling of the layers of this type, from transformers 5's `rope_parameters` or the older pair
        of keys, where sliding-window layers are not scaled."""
        parameters = self.facts.get("rope_parameters") or self.facts.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            self.problem(f"rope_parameters must be an object, not {parameters!r}")
            return 1e4, None
        if any(isinstance(value, dict) for value in parameters.values()):
            parameters = parameters.get(layers) or {}
        elif layers != "full_attention":
            parameters = {}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in supported:
            self.problem(f"RoPE of type {kind!r} is not supported; the types are {', '.join(supported)}")
        theta = parameters.get("rope_theta", self.facts.get(theta_key, default_theta))
        if not isinstance(theta, int | float) or isinstance(theta, bool):
            self.problem(f"rope_theta must be a number, not {theta!r}")
            theta = 1e4
        if kind == "default":
            return float(theta), None
        scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "type")} | {"rope_type": kind}
        return float(theta), scaling

    def refuse_true(self, *keys: str) -> None:
        for key in keys:
            if self.facts.get(key):
                self.problem(f"{key} is true; a {self.family} is built without these biases only")

    def require(self, key: str, built: Any) -> None:
        """Refuse another value than the one that is built, which is also what an absent key means."""
        if (value := self.facts.get(key, built)) != built:
            self.problem(f"{key} is {value!r}; a {self.family} is built with {built!r} only")

    def groups(self, groups: int, chosen: int, *, experts: int) -> tuple[int, int]:
        """Groups of experts and groups of a token, by n_group and topk_group or these defaults; (1, 1) when a token may
        choose from all groups."""
        groups, chosen = self.size("n_group", groups), self.size("topk_group", chosen)
        if groups == chosen:
            return 1, 1
        if chosen > groups:
            self.problem(f"topk_group {chosen} is larger than n_group {groups}")
        if experts % groups or experts // groups < 2:
            self.problem(f"{experts} experts do not make {groups} equal groups of two or more (n_group)")
        if self.size("num_experts_per_tok", 8) > chosen * (experts // groups):
            self.problem(
                f"num_experts_per_tok {self.facts.get('num_experts_per_tok', 8)} is larger than the experts in "
                f"{chosen} of {groups} groups"
            )
        return groups, chosen

    def refuse_sliding_window(self) -> None:
        if self.facts.get("use_sliding_window") or "sliding_attention" in (self.facts.get("layer_types") or []):
            self.problem(f"sliding-window attention is in use; a {self.family} is built with full attention only")

    def check(self, shape: ModelShape) -> None:
        """What no family can do."""
        if self.facts.get("quantization_config"):
            self.problem("the checkpoint is quantized; start from its float32 or bfloat16 original, or cast it first")
        if shape.num_heads % shape.num_kv_heads:
            self.problem(
                f"{shape.num_heads} attention heads are not a multiple of {shape.num_kv_heads} key/value heads"
            )
        if shape.position == "rope" and shape.head_dim % 2:
            self.problem(f"head_dim {shape.head_dim} is odd; RoPE needs an even one")
        if shape.router_score == "sigmoid" and shape.norm_topk_prob != (shape.experts_per_token > 1):
            self.problem(
                f"norm_topk_prob is {shape.norm_topk_prob} with {shape.experts_per_token} experts a token; sigmoid "
                "scores are scaled to sum to one when there are several, and left when there is one"
            )
        if shape.experts_per_token > shape.num_experts:
            self.problem(
                f"num_experts_per_tok {shape.experts_per_token} is larger than the {shape.num_experts} experts"
            )


def _family(file: Path, facts: Mapping[str, Any]) -> str:
    architectures = facts.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else [architectures]:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
        if name in NOT_BUILT:
            raise ConfigError(f"{file}: {name} is not supported: {NOT_BUILT[name]}")
    if not architectures and facts.get("model_type") in _READERS:
        return str(facts["model_type"])
    named = ", ".join(map(str, architectures)) or f"model_type {facts.get('model_type')!r}"
    raise ConfigError(f"{file}: {named} is not supported; the families are {', '.join(ARCHITECTURES)}")


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    file = path if path.suffix == ".json" else path / "config.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist: the model must be the folder of a Hugging Face checkpoint, with its config.json"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON (line {error.lineno}: {error.msg}); fetch it again") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(facts).__name__}")
    return file, facts
