"""Floating-point operations of a model, of one token, by kind of layer.

A matrix of n entries costs 2 n operations a token. Causal attention over a sequence of L tokens costs a token
2 N D L on average: scores and sums over the L / 2 tokens before it, a window fewer. The state-space scan is counted as
the chunked form computes it (Dao and Gu, arXiv 2405.21060). A backward pass costs twice the forward pass.

Legend: N query heads, D head dimension, V vocabulary, Q tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from millrace.config.model_shape import LayerShape, ModelShape


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one token in one forward pass."""

    dense: float
    """In matrices that every token goes through, the router and shared experts included."""
    experts: float
    """In the chosen experts."""
    attention: float
    """In the part that grows with the sequence."""
    scan: float
    head: float
    """In the output layer."""

    @property
    def layers(self) -> float:
        return self.dense + self.experts + self.attention + self.scan

    @property
    def total(self) -> float:
        return self.layers + self.head


def forward_flops(shape: ModelShape, length: float) -> Flops:
    """Mean over the tokens of a sequence of `length` tokens."""
    dense = experts = attention = scan = 0.0
    for index, layer in enumerate(shape.layers):
        parameters = shape.layer_parameters(index)
        dense += 2 * (parameters.cut + parameters.replicated)
        experts += 2 * shape.experts_per_token * parameters.expert
        attention += _attention(shape, layer, length) if layer.mixer == "attention" else 0.0
        scan += _scan(shape) if layer.mixer == "mamba" else 0.0
    head = 2.0 * shape.vocab_size * shape.hidden_size
    return Flops(dense=dense, experts=experts, attention=attention, scan=scan, head=head)


def train_flops(shape: ModelShape, length: float, recompute: str) -> float:
    """Of one token: forward, backward, and what is computed again."""
    forward = forward_flops(shape, length)
    again = {"none": 0.0, "selective": forward.attention, "full": forward.layers}[recompute]
    return 3 * forward.total + again


def _attention(shape: ModelShape, layer: LayerShape, length: float) -> float:
    seen = length / 2 if layer.window is None else min(length / 2, layer.window)
    latent = shape.latent_attention
    key, value = shape.head_dim, shape.head_dim
    if latent is not None:
        key, value = latent.nope_dim + latent.rope_dim, latent.v_dim
    return 2 * shape.num_heads * (key + value) * seen


def _scan(shape: ModelShape) -> float:
    mamba = shape.mamba
    assert mamba is not None
    within = mamba.chunk * (mamba.groups * mamba.state + mamba.inner)
    states = 4 * mamba.inner * mamba.state
    return within + states + 2 * mamba.convolved * mamba.conv_kernel
