"""Layer specifications: which module Megatron-Core builds in each place of a transformer layer.

On CUDA these are Transformer Engine's fused modules, where `kernels` finds that it can be used. Elsewhere they are
Megatron-Core's own parallel linears with the two modules it has no fitting plain version of: an RMSNorm that works
under sequence parallelism, and an attention over packed sequences whose memory is linear in their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from millrace.config.model_shape import LayerShape, MambaShape
from millrace.megatron.attention import PackedAttention
from millrace.megatron.latent_attention import LatentAttention, latent_attention_spec


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019) over the last dimension, times the weight or, where the config
    says so, 1 + weight.

    Under sequence parallelism each rank sees part of the tokens; the flag on the weight tells Megatron-Core to add up
    the ranks' gradients. eps: the config's where the layer passes none, as Megatron-Core's Mamba layer did before 0.19.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = torch.cuda.current_device()
        unit = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(unit(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centered:  # 1 + weight would lose the weight's last bits in bfloat16
            return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), self.eps).type_as(x)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class TorchSpecProvider(LocalSpecProvider):
    """Megatron-Core's own linears and experts with this module's norm and attention."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return PackedAttention


def block_spec(
    config: TransformerConfig, layers: Sequence[LayerShape], mamba: MambaShape | None
) -> TransformerBlockSubmodules:
    """Specification of one pipeline stage, of these layers."""
    use_te = config.transformer_impl == "transformer_engine"
    specs = {layer: _layer(config, layer, mamba, use_te) for layer in set(layers)}
    norm = _transformer_engine_norm() if use_te else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[specs[layer] for layer in layers], layer_norm=norm)


def _layer(config: TransformerConfig, layer: LayerShape, mamba: MambaShape | None, use_te: bool) -> ModuleSpec:
    if layer.mixer is None or layer.ffn is None:
        from millrace.megatron.hybrid import part_layer  # not before megatron.gaps has filled them

        return part_layer(config, layer, mamba, TESpecProvider() if use_te else TorchSpecProvider())
    return (_transformer_engine_layer if use_te else _torch_layer)(config, layer.ffn == "experts")


def _transformer_engine_layer(config: TransformerConfig, moe: bool) -> ModuleSpec:
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    if config.multi_latent_attention:
        spec.submodules.self_attention.module = LatentAttention
    return spec


def _transformer_engine_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


FUSED_ATTENTION_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
FUSED_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def _self_attention_spec(provider: TorchSpecProvider, config: TransformerConfig) -> ModuleSpec:
    qk_norm = provider.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _torch_layer(config: TransformerConfig, moe: bool) -> ModuleSpec:
    provider = TorchSpecProvider()
    if latent := isinstance(config, MLATransformerConfig):
        attention = latent_attention_spec(provider, config)
    else:
        attention = _self_attention_spec(provider, config)
    mlp = get_mlp_module_spec_for_backend(
        backend=provider, num_experts=config.num_moe_experts if moe else None, moe_grouped_gemm=False
    )
    # Transformer Engine fuses a norm into the linear behind it. Checkpoints carry those names, so that they load with
    # either kind of layer; a mixture of experts has no such linear.
    fused_names = dict(FUSED_LATENT_NORMS if latent else FUSED_ATTENTION_NORM)
    if not moe:
        fused_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=provider.layer_norm(),
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=fused_names,
        ),
    )
