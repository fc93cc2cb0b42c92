"""A Megatron-Core GPT from the facts of a Hugging Face config.json.

Legend: T tokens of a packed micro-batch (padded to a multiple of TP), H hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ParallelConfig, TrainerConfig
from millrace.megatron.specs import block_spec, transformer_engine_is_there
from millrace.megatron.topology import LayoutError


class HiddenStateModel(GPTModel):
    """A GPT whose last pipeline stage ends after the final norm.

    forward returns hidden states [T, 1, H] (with sequence parallelism this rank's [T / TP, 1, H]); the log-prob head
    takes them from there, so that the logits of a whole micro-batch never exist at one time.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """Vocabulary rows of this tensor-parallel rank [V / TP, H]; on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(
    shape: ModelShape, parallel: ParallelConfig, trainer: TrainerConfig, dtype: torch.dtype, device: torch.device
) -> HiddenStateModel:
    """This rank's pipeline stage, on `device`, with random weights. Raises LayoutError for a layout that cannot hold
    it."""
    check_layout(shape, parallel)
    config = transformer_config(shape, parallel, trainer, dtype, device)
    first, last = layers_of_stage(shape, parallel.pp, parallel_state.get_pipeline_model_parallel_rank())
    model = HiddenStateModel(
        config=config,
        transformer_layer_spec=block_spec(config, shape.moe_layer_mask[first:last], device),
        vocab_size=shape.padded_vocab_size(parallel.tp),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    model.rotary_pos_emb.inv_freq = rope_inverse_frequencies(shape).to(device)
    reduce_expert_gradients_over_expert_ranks(model, parallel)
    return model.to(device)


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Raises LayoutError, with one sentence for each problem, when the layout cannot hold the model."""
    p, problems = parallel, []
    if shape.num_heads % p.tp or shape.num_kv_heads % p.tp:
        problems.append(
            f"parallel.tp {p.tp} does not divide the {shape.num_heads} attention heads and {shape.num_kv_heads} "
            "key/value heads"
        )
    if shape.num_layers % p.pp:
        problems.append(f"parallel.pp {p.pp} does not divide the {shape.num_layers} layers")
    if shape.num_experts:
        problems += _expert_problems(shape, p)
    elif p.ep > 1 or p.etp > 1:
        problems.append(f"parallel.ep {p.ep} and parallel.etp {p.etp} must be 1: the model has no experts")
    if problems:
        raise LayoutError("; ".join(problems))


def _expert_problems(shape: ModelShape, p: ParallelConfig) -> list[str]:
    problems = []
    if shape.num_experts % p.ep:
        problems.append(f"parallel.ep {p.ep} does not divide the {shape.num_experts} experts")
    if shape.moe_ffn_hidden_size % p.etp:
        problems.append(f"parallel.etp {p.etp} does not divide the experts' width {shape.moe_ffn_hidden_size}")
    if p.tp > 1 and not p.sequence_parallel:
        problems.append(f"a mixture of experts with parallel.tp {p.tp} needs parallel.sequence_parallel=true")
    return problems


def layers_of_stage(shape: ModelShape, pp: int, pp_rank: int) -> tuple[int, int]:
    """The layers [first, last) of one pipeline stage; all stages have the same number."""
    each = shape.num_layers // pp
    return pp_rank * each, (pp_rank + 1) * each


def transformer_config(
    shape: ModelShape, parallel: ParallelConfig, trainer: TrainerConfig, dtype: torch.dtype, device: torch.device
) -> TransformerConfig:
    """Megatron-Core's description of the model. Kernels that exist on CUDA with Transformer Engine only are off
    without."""
    fused = device.type == "cuda" and transformer_engine_is_there()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.attention_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # the one that takes unequal lengths
        calculate_per_token_loss=True,  # gradients are sums; the weights of the tokens hold every division
        use_cpu_initialization=device.type == "cpu",
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        bias_dropout_fusion=False,
        bias_activation_fusion=fused,
        apply_rope_fusion=fused,
        gradient_accumulation_fusion=False,
        **_recompute_options(trainer, shape, parallel),
        **_expert_options(shape, fused),
    )


def _recompute_options(trainer: TrainerConfig, shape: ModelShape, parallel: ParallelConfig) -> dict[str, Any]:
    if trainer.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if trainer.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def _expert_options(shape: ModelShape, fused: bool) -> dict[str, Any]:
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_layer_freq": [int(moe) for moe in shape.moe_layer_mask],
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_router_topk": shape.experts_per_token,
        "moe_router_score_function": "softmax",
        # Softmax over the chosen experts equals softmax over all, then scaled to sum to one (norm_topk_prob).
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": False,
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


def reduce_expert_gradients_over_expert_ranks(model: torch.nn.Module, parallel: ParallelConfig) -> None:
    """Send the gradients of experts to the expert-data-parallel group whenever it is not the data-parallel group.

    Megatron-Core does that for EP > 1 only. With TP > 1, ETP < TP and EP = 1 the tensor-parallel ranks hold the same
    experts but send them different tokens; without this each would keep the gradient of its own tokens, silently wrong.
    """
    if parallel.ep == 1 and parallel.etp == parallel.tp:
        return
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            setattr(parameter, "allreduce", False)  # noqa: B010
