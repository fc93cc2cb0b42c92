"""Layer specifications: which module Megatron-Core builds in each place of a transformer layer.

On CUDA these are Transformer Engine's fused modules. Without Transformer Engine (always on CPU) they are
Megatron-Core's own parallel linears with the two modules it has no fitting plain version of: an RMSNorm that works
under sequence parallelism, and an attention over packed sequences whose memory is linear in their length.

Legend: T tokens of a micro-batch, S sequence length, B batch, N heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
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
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from millrace.config.model_shape import LayerShape, MambaShape

log = logging.getLogger(__name__)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019) over the last dimension.

    Under sequence parallelism each rank sees part of the tokens; the flag on the weight tells Megatron-Core to add up
    the ranks' gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedAttention(MegatronModule):
    """Causal attention over torch's scaled_dot_product_attention, for padded batches and packed sequences.

    A packed micro-batch attends within each of its sequences only. Sequences of equal length go through one call, so
    the memory is linear in the number of tokens and many short sequences cost few calls.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("context parallelism needs Transformer Engine's attention")
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D], or packed: [T, N, D], [T, G, D] -> [T, N,
        D]."""
        if packed_seq_params is None:
            batch_first = (t.transpose(0, 1) for t in (query, key, value))
            return self._attend(*batch_first).transpose(0, 1).flatten(2)
        lengths = _segment_lengths(packed_seq_params, query.shape[0])
        pieces = [t.split(lengths) for t in (query, key, value)]
        outputs = [query] * len(lengths)
        for members in _by_length(lengths):
            stacked = (torch.stack([piece[i] for i in members]) for piece in pieces)
            for i, output in zip(members, self._attend(*stacked).unbind(), strict=True):
                outputs[i] = output
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, S, N, D], [B, S, G, D] twice -> [B, S, N, D]"""
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:  # the memory-linear CPU kernel takes equal head counts only
            key, value = (t.repeat_interleave(repeats, dim=2) for t in (key, value))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale).transpose(1, 2)


def _segment_lengths(packed: PackedSeqParams, tokens: int) -> list[int]:
    bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    edges = bounds.tolist()
    if edges[-1] != tokens:
        raise ValueError(f"cu_seqlens ends at {edges[-1]}, but the packed micro-batch has {tokens} tokens")
    return [end - start for start, end in itertools.pairwise(edges)]


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the sequences of each length."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    return list(groups.values())


class TorchSpecProvider(LocalSpecProvider):
    """Megatron-Core's own linears and experts with this module's norm and attention."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return PackedAttention


def transformer_engine_is_there() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def block_spec(
    config: TransformerConfig, layers: Sequence[LayerShape], mamba: MambaShape | None, device: torch.device
) -> TransformerBlockSubmodules:
    """Specification of one pipeline stage, of these layers."""
    use_te = device.type == "cuda" and transformer_engine_is_there()
    if device.type == "cuda" and not use_te:
        log.warning(
            "Transformer Engine is not installed: layers are built from plain torch modules, which are slower and have "
            "no FP8"
        )
    specs = {layer: _layer(config, layer, mamba, use_te) for layer in set(layers)}
    norm = _transformer_engine_norm() if use_te else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[specs[layer] for layer in layers], layer_norm=norm)


def _layer(config: TransformerConfig, layer: LayerShape, mamba: MambaShape | None, use_te: bool) -> ModuleSpec:
    if layer.mixer is None or layer.ffn is None:
        from millrace.megatron.hybrid import part_layer  # not before megatron.cpu has adapted Megatron-Core

        return part_layer(config, layer, mamba, TESpecProvider() if use_te else TorchSpecProvider())
    return (_transformer_engine_layer if use_te else _torch_layer)(config, layer.ffn == "experts")


def _transformer_engine_layer(config: TransformerConfig, moe: bool) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )


def _transformer_engine_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _torch_layer(config: TransformerConfig, moe: bool) -> ModuleSpec:
    provider = TorchSpecProvider()
    qk_norm = provider.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
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
    mlp = get_mlp_module_spec_for_backend(
        backend=provider, num_experts=config.num_moe_experts if moe else None, moe_grouped_gemm=False
    )
    # Transformer Engine fuses a norm into the linear behind it. Checkpoints carry those names, so that they load with
    # either kind of layer; a mixture of experts has no such linear.
    fused_names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
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
