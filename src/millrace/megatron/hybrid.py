"""Layers of hybrid models, which are one part each: a Mamba-2 mixer, attention, a feed-forward or experts.

They stand in Megatron-Core's transformer block like any other layer, so that pipeline stages, recomputation,
checkpoints and the model around them are the same for all families.

Imported where such a layer is built, after `megatron.gaps` has provided what MambaMixer asks for.
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import HAVE_MAMBA_SSM, MambaMixer, MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank
from torch import Tensor

from millrace.config.model_shape import LayerShape, MambaShape
from millrace.megatron.topology import LayoutError


class MambaBlockLayer(MambaLayer):
    """Megatron-Core's Mamba layer with the interface of a transformer layer."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        assert pg_collection is not None
        before = get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))
        super().__init__(
            config,
            submodules,
            layer_number=layer_number + before,
            pg_collection=pg_collection,
            pp_layer_offset=before,
        )
        self.mixer.norm.eps = config.layernorm_epsilon  # Megatron-Core gives it 1e-5
        # Megatron-Core makes these two in float32, which its own training casts away again: the distributed optimizer
        # mixes up the parameters of a group that has two types. Their exact values are the optimizer's, as everywhere.
        for parameter in (self.mixer.A_log, self.mixer.D):
            parameter.data = parameter.data.to(config.params_dtype)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H] -> [S, B, H], and the context as it came"""
        return super().forward(hidden_states, packed_seq_params=packed_seq_params), context


def part_layer(
    config: TransformerConfig, layer: LayerShape, mamba: MambaShape | None, backend: BackendSpecProvider
) -> ModuleSpec:
    """Specification of a layer that is one part."""
    if layer.mixer == "mamba":
        assert mamba is not None
        return _mamba_layer(mamba, backend)
    if layer.mixer == "attention":
        return _attention_layer(backend)
    return _ffn_layer(config, layer, backend)


def _mamba_layer(mamba: MambaShape, backend: BackendSpecProvider) -> ModuleSpec:
    if not HAVE_MAMBA_SSM:
        raise LayoutError(
            "the model has Mamba-2 layers, but the installed mamba-ssm does not load: build it for this torch (pip "
            "install mamba-ssm causal-conv1d --no-build-isolation), or uninstall it for a scan in plain torch"
        )
    norm, column = _norm_and_column(backend)
    mixer = ModuleSpec(
        module=MambaMixer,
        params={"d_conv": mamba.conv_kernel, "chunk_size": mamba.chunk},
        submodules=MambaMixerSubmodules(in_proj=column, out_proj=backend.row_parallel_linear()),
    )
    return ModuleSpec(
        module=MambaBlockLayer,
        submodules=MambaLayerSubmodules(
            norm=norm,
            mixer=mixer,
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_fused_name(backend, "norm.", "mixer.in_proj."),
        ),
    )


def _attention_layer(backend: BackendSpecProvider) -> ModuleSpec:
    norm, column = _norm_and_column(backend)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_fused_name(backend, "input_layernorm.", "self_attention.linear_qkv."),
        ),
    )


def _ffn_layer(config: TransformerConfig, layer: LayerShape, backend: BackendSpecProvider) -> ModuleSpec:
    moe = layer.ffn == "experts"
    norm = backend.layer_norm(rms_norm=True) if moe else _norm_and_column(backend)[0]
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(
                backend=backend,
                num_experts=config.num_moe_experts if moe else None,
                moe_grouped_gemm=config.moe_grouped_gemm,
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if moe else _fused_name(backend, "pre_mlp_layernorm.", "mlp.linear_fc1."),
        ),
    )


def _norm_and_column(backend: BackendSpecProvider) -> tuple[Any, type]:
    """A norm and the linear behind it; Transformer Engine has both in one module."""
    if backend.fuse_layernorm_and_linear():
        return IdentityOp, backend.column_parallel_layer_norm_linear()
    return backend.layer_norm(rms_norm=True), backend.column_parallel_linear()


def _fused_name(backend: BackendSpecProvider, norm: str, linear: str) -> dict[str, str]:
    """The name a norm has in checkpoints: that of Transformer Engine, so that they load with either kind of layer."""
    return {} if backend.fuse_layernorm_and_linear() else {norm: f"{linear}layer_norm_"}
