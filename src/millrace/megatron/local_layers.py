"""What some layers have besides Megatron-Core's: a window of attention (Mistral, Gemma), a RoPE base for it, and norms
behind their parts (Gemma).

They stand on the plain torch modules of `specs`, on CUDA as well. Legend: S tokens of the longest sequence, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from millrace.config.model_shape import LayerShape, ModelShape

MakeAdd = Callable[[bool, bool], Callable[..., Tensor]]
"""Megatron-Core's makers of a residual addition: training, fused -> (output, bias), residual, dropout -> sum."""


def needs_local_layers(shape: ModelShape) -> bool:
    """Whether the model has layers of this module."""
    return shape.sandwich_norms or any(layer.window is not None for layer in shape.layers)


class LocalAttention(SelfAttention):
    """Self-attention that looks back on `window` tokens, itself included; with `rope_theta` it rotates queries and keys
    by that base instead of the model's."""

    def __init__(self, *args: Any, window: int, rope_theta: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.core_attention.window = window
        self.rope_theta = rope_theta

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if rotary_pos_emb is not None and self.rope_theta is not None:
            rotary_pos_emb = rope_angles(rotary_pos_emb, self.rope_theta)
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)


def rope_angles(like: Tensor, theta: float) -> Tensor:
    """Angles [S, 1, 1, D] of plain RoPE with the base `theta`, for as many tokens and channels as `like` has."""
    tokens, channels = like.shape[0], like.shape[-1]
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=like.device) / channels
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32, device=like.device), 1.0 / theta**exponents)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


class SandwichLayer(TransformerLayer):
    """A transformer layer with a norm behind its attention and behind its feed-forward part, before either is added to
    the residual."""

    self_attn_bda: MakeAdd
    mlp_bda: MakeAdd

    def __init__(self, *args: Any, post_norm: type[torch.nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size = self.config.hidden_size
        self.post_attention_layernorm = post_norm(self.config, size, self.config.layernorm_epsilon)
        self.post_mlp_layernorm = post_norm(self.config, size, self.config.layernorm_epsilon)
        self.self_attn_bda = _after(self.post_attention_layernorm, self.self_attn_bda)
        self.mlp_bda = _after(self.post_mlp_layernorm, self.mlp_bda)


def _after(norm: torch.nn.Module, make_add: MakeAdd) -> MakeAdd:
    """The residual addition with the norm before it."""

    def make(training: bool, fused: bool) -> Callable[..., Tensor]:
        add = make_add(training, fused)

        def normed_add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_and_bias
            return add((norm(output if bias is None else output + bias), None), residual, dropout)

        return normed_add

    return make


def make_local(spec: TransformerBlockSubmodules, shape: ModelShape, layers: Sequence[LayerShape]) -> None:
    """Turn the specs of these layers, as many as `spec` has, into those of this module where the model needs it."""
    made: set[int] = set()
    for layer_spec, layer in zip(spec.layer_specs, layers, strict=True):
        if id(layer_spec) in made:  # layers that are alike share a spec
            continue
        made.add(id(layer_spec))
        if shape.sandwich_norms:
            layer_spec.module = SandwichLayer
            layer_spec.params = {**layer_spec.params, "post_norm": spec.layer_norm}
        if layer.window is not None:
            attention = layer_spec.submodules.self_attention
            attention.module = LocalAttention
            attention.params = {**attention.params, "window": layer.window, "rope_theta": shape.rope_local_theta}
