"""Multi-head latent attention (DeepSeek-V2, 2024), and what Megatron-Core must be told to build it as released.

Queries and keys/values pass through narrow latents, each with a norm of its own; part of every head's channels carries
no position, and a small part, shared by the heads on the key side, carries RoPE. YaRN (Peng et al., 2023) stretches
RoPE and sharpens the softmax.

Under tensor parallelism the projections into the latents are whole on every rank and the projections out of them are
cut by heads. Each rank then sees only its own heads' gradient of the shared rotary key; sequence parallelism, under
which that key is gathered, adds the ranks' parts up, so that tensor parallelism needs it here.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig

NORMED = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
LATENT_NORM_EPS = 1e-6
"""The norms of the latents keep this whatever the model's other norms use, as in transformers' classes."""


class LatentAttention(MLASelfAttention):
    """Megatron-Core's latent attention with the released models' epsilon in the norms of its latents."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel:
            raise ValueError("latent attention under tensor parallelism needs sequence parallelism for right gradients")
        names = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")
        for module in (module for name, module in self.named_children() if name in names):
            if hasattr(module, "eps"):  # a norm, or Transformer Engine's linear with the norm fused into it
                setattr(module, "eps", LATENT_NORM_EPS)  # noqa: B010

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """What these places are built from: what the specification names. Megatron-Core asks since a version behind
        0.16, and would put a norm before the projection of queries without a latent, where released models have none.
        """
        return {name: getattr(submodules, name) for name in NORMED}


def latent_attention_spec(provider: BackendSpecProvider, config: MLATransformerConfig) -> ModuleSpec:
    """Latent attention from a provider of plain modules, with its two norms as modules of their own."""
    # The module compares types with those of Transformer Engine: 0.16 takes it for installed when it is not, and later
    # versions know the plain linear by name only beside it.
    multi_latent_attention.HAVE_TE = isinstance(multi_latent_attention.TELinear, type)
    multi_latent_attention.Linear = Linear
    norm = provider.layer_norm(for_qk=True)
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=provider.column_parallel_linear(),
            linear_q_down_proj=Linear,
            linear_q_up_proj=provider.column_parallel_linear(),
            linear_kv_down_proj=Linear,
            linear_kv_up_proj=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=IdentityOp if config.q_lora_rank is None else norm,  # of a latent that is not there
            kv_layernorm=norm,
        ),
    )
