"""What a vLLM server holds on each of its ranks: its share of the weights, and a cache for the sequences it decodes.

Legend: G key/value heads, D head dimension, H heads, P channels of a Mamba head, N its state, C channels of its
convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from millrace.config.model_shape import ModelShape
from millrace.config.plan import BYTES
from millrace.config.schema import FleetConfig

STATE_BYTES = 4
"""Mamba states are kept in float32 (`--mamba-ssm-cache-dtype float32`), which the server is started with."""


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Bytes of the cache on one rank of an engine."""

    per_token: int
    """Keys and values of one token in the layers that look back on everything."""
    per_sequence: int
    """What a sequence needs however long it is: Mamba states, and full windows of attention."""

    def of_sequence(self, length: int) -> int:
        return self.per_sequence + self.per_token * length


def cache_shape(shape: ModelShape, fleet: FleetConfig) -> CacheShape:
    """The cache of one rank. Key/value heads that are fewer than the ranks are held by several of them."""
    tp, width = fleet.tensor_parallel, BYTES[fleet.dtype]
    heads = max(1, shape.num_kv_heads // tp)
    each = 2 * heads * shape.head_dim * width
    if (latent := shape.latent_attention) is not None:  # every rank holds the latents whole
        each = (latent.kv_rank + latent.rope_dim) * width
    attention = [layer for layer in shape.layers if layer.mixer == "attention"]
    windows = [layer.window for layer in attention if layer.window is not None]
    per_sequence = sum(min(window, fleet.max_model_len) for window in windows) * each
    if (mamba := shape.mamba) is not None:
        state = mamba.heads * mamba.head_dim * mamba.state * STATE_BYTES
        convolution = mamba.convolved * (mamba.conv_kernel - 1) * width
        per_sequence += sum(layer.mixer == "mamba" for layer in shape.layers) * (state + convolution) // tp
    return CacheShape(per_token=(len(attention) - len(windows)) * each, per_sequence=per_sequence)


def engine_weight_bytes(shape: ModelShape, fleet: FleetConfig) -> int:
    """Weights of one rank of an engine, whose experts are cut over all its ranks."""
    layers = [shape.layer_parameters(layer) for layer in range(shape.num_layers)]
    tp = fleet.tensor_parallel
    cut = sum(layer.cut + shape.num_experts * layer.expert for layer in layers)
    vocabulary = shape.padded_vocab_size(tp) * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    whole = sum(layer.replicated for layer in layers) + shape.hidden_size
    width = BYTES[fleet.dtype]
    linears = cut * (1 if fleet.quantization == "fp8" else width)
    return (linears + vocabulary * width) // tp + whole * width


def sequences_that_fit(cache_bytes: float, cache: CacheShape, length: int) -> int:
    """Sequences of `length` tokens that a cache holds at one time."""
    return max(0, int(cache_bytes // max(1, cache.of_sequence(length))))
