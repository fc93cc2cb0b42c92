"""Megatron-Core's description of a model, from the facts of a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from millrace.config.model_shape import Activation, ModelShape
from millrace.config.schema import ParallelConfig, PrecisionConfig, TrainerConfig
from millrace.megatron.kernels import accumulates_gradients_in_products, uses_transformer_engine
from millrace.megatron.precision import PLAIN, require_computable, transformer_options

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu2": squared_relu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    grouped_experts: bool = True,
    fused_gradients: bool = False,
    precision: PrecisionConfig = PLAIN,
) -> TransformerConfig:
    """Megatron-Core's description of the model. Kernels that exist on CUDA with Transformer Engine only are off
    without. `grouped_experts`: compute all experts of a rank in one grouped product; `fused_gradients`: let products of
    weight gradients, of a model that has gradient buffers for all its weights, add to them; each where that is
    possible. Raises PrecisionError for an FP8 that this machine cannot compute."""
    require_computable(precision, shape, device)
    fused = uses_transformer_engine(shape, device, dtype)
    describe = TransformerConfig if shape.latent_attention is None else MLATransformerConfig
    return describe(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        layernorm_zero_centered_gamma=shape.zero_centered_norms,
        qk_layernorm=shape.qk_norm or shape.latent_attention is not None,
        add_bias_linear=False,
        add_qkv_bias=shape.attention_bias,
        gated_linear_unit=shape.gated,
        softmax_scale=shape.attention_scale,
        activation_func=ACTIVATIONS[shape.activation],
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        tp_comm_overlap=trainer.overlap_tensor_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,  # packed micro-batches differ in length
        deterministic_mode=trainer.deterministic,
        **_dispatcher_options(trainer),
        calculate_per_token_loss=True,  # gradients are sums; the weights of the tokens hold every division
        transformer_impl="transformer_engine" if fused else "local",
        use_cpu_initialization=device.type == "cpu",
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        bias_dropout_fusion=False,
        bias_activation_fusion=fused and shape.gated and shape.activation == "silu",
        apply_rope_fusion=fused and shape.latent_attention is None,
        gradient_accumulation_fusion=fused_gradients and device.type == "cuda" and accumulates_gradients_in_products(),
        **_stage_options(shape, parallel.pp),
        **_recompute_options(trainer, shape, parallel),
        **_expert_options(shape, fused and grouped_experts and trainer.grouped_gemm, fused and trainer.permute_fusion),
        **_latent_attention_options(shape),
        **_mamba_options(shape),
        **transformer_options(precision, shape),
    )


def _stage_options(shape: ModelShape, pp: int) -> dict[str, Any]:
    """Which stage holds which layers, where they are not the same number in each."""
    if shape.num_layers % pp == 0:
        return {}
    stages = [["decoder"] * len(shape.stage_layers(pp, stage)) for stage in range(pp)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return {"pipeline_model_parallel_layout": stages}


def _recompute_options(trainer: TrainerConfig, shape: ModelShape, parallel: ParallelConfig) -> dict[str, Any]:
    if trainer.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(trainer.recompute_modules)}
    if trainer.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": trainer.recompute_method,
            "recompute_num_layers": trainer.recompute_layers,
        }
    return {}


def _dispatcher_options(trainer: TrainerConfig) -> dict[str, Any]:
    """Both dispatchers take micro-batches of unequal length."""
    if trainer.token_dispatcher == "deepep":
        return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    return {"moe_token_dispatcher_type": "alltoall"}


def _expert_options(shape: ModelShape, grouped: bool, fused_permutation: bool) -> dict[str, Any]:
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_layer_freq": [int(layer.ffn == "experts") for layer in shape.layers],
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shape.shared_ffn_hidden_size or None,
        "moe_latent_size": shape.moe_latent_size or None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": grouped,
        "moe_permute_fusion": fused_permutation,
        **_router_options(shape),
    }


def _router_options(shape: ModelShape) -> dict[str, Any]:
    options: dict[str, Any] = {
        "moe_router_topk": shape.experts_per_token,
        "moe_router_score_function": shape.router_score,
        "moe_router_topk_scaling_factor": shape.router_scale if shape.router_scale != 1.0 else None,
    }
    if shape.router_score == "softmax":
        # Softmax over the chosen experts equals softmax over all, then scaled to sum to one (norm_topk_prob).
        options["moe_router_pre_softmax"] = not shape.norm_topk_prob
    if shape.router_bias:
        # The bias comes with the checkpoint; at a rate of 0 a step leaves it as it is.
        options |= {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.0}
    if shape.expert_groups > 1:
        options |= {
            "moe_router_num_groups": shape.expert_groups,
            "moe_router_group_topk": shape.groups_per_token,
        }
    return options


def _latent_attention_options(shape: ModelShape) -> dict[str, Any]:
    if (latent := shape.latent_attention) is None:
        return {}
    options: dict[str, Any] = {
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.nope_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.v_dim,
        "rotary_base": shape.rope_theta,
        "rope_type": "rope",
    }
    if (yarn := shape.rope_scaling) is not None:
        options |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": yarn["factor"],
            "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "beta_fast": yarn["beta_fast"],
            "beta_slow": yarn["beta_slow"],
            "mscale": yarn["mscale"],
            "mscale_all_dim": yarn["mscale_all_dim"],
        }
    return options


def _mamba_options(shape: ModelShape) -> dict[str, Any]:
    if (mamba := shape.mamba) is None:
        return {}
    return {
        "is_hybrid_model": True,
        "mamba_num_heads": mamba.heads,
        "mamba_head_dim": mamba.head_dim,
        "mamba_num_groups": mamba.groups,
        "mamba_state_dim": mamba.state,
    }


def rope_inverse_frequencies(shape: ModelShape) -> Tensor:
    """Angular frequency of each pair of channels [head_dim / 2], float32, on the CPU.

    Plain: theta^(-2i / D) (Su et al., 2021). `linear` divides all by `factor`. `llama3` keeps wavelengths shorter than
    original_max_position_embeddings / high_freq_factor, divides those longer than original_max_position_embeddings /
    low_freq_factor by `factor`, and interpolates between (Llama 3.1).
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / factor + keep * frequencies
