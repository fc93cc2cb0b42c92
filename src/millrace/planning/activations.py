"""What one trainer rank keeps of a micro-batch for the backward pass, part by part.

Two kinds of layers are described: `local`, the plain torch modules that run on CPU ranks (and on CUDA without
Transformer Engine), and `fused`, Transformer Engine's. They differ: plain norms keep the normalised input as well, in
bfloat16 a float32 copy of it; plain attention keeps keys and values repeated to all heads; an unfused activation keeps
what it multiplies; the state-space scan in torch keeps float32 inputs and a state for each block. The `local` numbers
are measured on CPU ranks (tests/distributed/test_memory.py); the `fused` ones are read from what the kernels save and
have not been measured.

Counted is what autograd saves. Left out are attention masks of layers with a window, and the decays that the scan in
torch keeps beside its saved tensors.

Legend: T tokens of a micro-batch on this rank, H hidden size, N query heads, G key/value heads, D head dimension,
F width of a feed-forward part, E experts, k experts of a token, b bytes of the model's data type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from millrace.config.model_shape import LayerShape, ModelShape
from millrace.config.plan import BYTES
from millrace.config.schema import ParallelConfig

FLOAT = 4
INDEX = 8
"""Bytes of a token id or an index."""

_LONGEST_BLOCK = {"small state": 32, "large state": 64}
"""Tokens of a block of the scan in torch, by whether the state is below 64."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a layer, or a layer that is recomputed."""

    name: str
    kept: float
    """Bytes held from the forward to the backward pass."""
    again: float = 0.0
    """Bytes that come back when the part is computed again, until its own backward pass is done."""
    largest: float = 0.0
    """Bytes of its largest activation, which bounds the gradients that are alive at one time."""


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """What decides the activations of a rank besides the model."""

    parallel: ParallelConfig
    dtype: str
    recompute: str
    """none, selective (of core attention) or full."""
    recomputed_layers: int | None = None
    """Of a pipeline stage, with full: the first so many, each by itself; None: all."""
    group: int = 1
    """With full and all layers: how many are computed again together."""
    tokens: int
    """Tokens of a micro-batch over all context-parallel ranks."""
    fused: bool
    """Whether the layers are Transformer Engine's."""


def stage_parts(shape: ModelShape, settings: ActivationSettings, pp_rank: int) -> list[Part]:
    """The parts of one pipeline stage for one micro-batch, in the order of the forward pass."""
    sizes = _Sizes(shape, settings)
    parts: list[Part] = []
    if pp_rank == 0:
        parts.append(Part(name="embedding", kept=INDEX * sizes.tokens))
    layers = [list(_layer_parts(shape.layers[n], sizes)) for n in shape.stage_layers(settings.parallel.pp, pp_rank)]
    again = 0 if settings.recompute != "full" else settings.recomputed_layers or len(layers)
    for first in range(0, again, settings.group):
        of_group = [part for layer in layers[first : first + settings.group] for part in layer]
        parts.append(_recomputed(of_group, sizes))
    parts += [part for layer in layers[again:] for part in layer]
    if pp_rank == settings.parallel.pp - 1:
        parts += [_norm("final norm", sizes), _head(sizes)]
    return parts


def held_bytes(parts: Sequence[Part]) -> float:
    """Bytes between the forward and the backward pass of one micro-batch."""
    return sum(part.kept for part in parts)


def peak_bytes(parts: Sequence[Part]) -> float:
    """The most bytes during the backward pass of one micro-batch, in which parts are freed from the last to the first
    and some come back."""
    peak = held = 0.0
    for part in parts:
        held += part.kept
        peak = max(peak, held + part.again)
    return peak


def in_flight(pp: int, pp_rank: int, micro_batches: int) -> int:
    """Micro-batches whose activations a pipeline stage holds at one time, by the one-forward-one-backward schedule."""
    return max(1, min(pp - pp_rank, micro_batches))


class _Sizes:
    """Sizes of one rank's activations."""

    def __init__(self, shape: ModelShape, settings: ActivationSettings) -> None:
        p = settings.parallel
        self.shape, self.settings = shape, settings
        self.fused = settings.fused
        self.b = BYTES[settings.dtype]
        self.cast = settings.dtype != "float32" and not settings.fused
        """Whether plain norms and scans keep float32 copies of what they read."""
        self.cp = p.cp
        self.tokens = -(-settings.tokens // p.cp)
        """Tokens inside a tensor-parallel region."""
        self.local = self.tokens / p.tp if p.sequence_parallel and p.tp > 1 else float(self.tokens)
        """Tokens between tensor-parallel regions."""
        self.hidden = shape.hidden_size
        self.heads = shape.num_heads / p.tp
        self.groups = max(1.0, shape.num_kv_heads / p.tp)
        self.tp = p.tp
        self.etp = p.etp
        self.stream = self.local * self.hidden * self.b
        """Bytes of the residual stream."""


def _recomputed(parts: Sequence[Part], s: _Sizes) -> Part:
    """Layers of which only the input stays; the rest comes back for their backward pass."""
    inside = sum(part.kept for part in parts)
    # Plain norms in bfloat16 keep a float32 copy of the layer's input, so that the input itself counts once more.
    again = inside if s.cast else inside - s.stream
    return Part(name="layer, recomputed", kept=s.stream, again=again, largest=max(part.largest for part in parts))


def _layer_parts(layer: LayerShape, s: _Sizes) -> Iterator[Part]:
    if layer.mixer == "attention":
        yield _norm("attention norm", s)
        yield _latent_attention(s) if s.shape.latent_attention is not None else _attention(s)
    elif layer.mixer == "mamba":
        yield _norm("mamba norm", s)
        yield _mamba(s)
    if layer.mixer is not None and s.shape.sandwich_norms:
        yield _norm("norm behind the mixer", s)
    if layer.ffn is not None:
        yield _norm("feed-forward norm", s)
        yield _experts(s) if layer.ffn == "experts" else _dense("feed-forward", s, s.shape.ffn_hidden_size)
        if s.shape.sandwich_norms:
            yield _norm("norm behind the feed-forward", s)


def _norm(name: str, s: _Sizes) -> Part:
    """An RMSNorm of the residual stream; its output is counted with what reads it."""
    if s.fused:
        return Part(name=name, kept=s.stream + FLOAT * s.local, largest=s.stream)
    return Part(name=name, kept=s.local * (2 * FLOAT * s.hidden + FLOAT), largest=FLOAT * s.local * s.hidden)


def _attention(s: _Sizes) -> Part:
    shape, t = s.shape, s.tokens
    q, kv = s.heads * shape.head_dim, s.groups * shape.head_dim
    mixed = t * (q + 2 * kv) * s.b
    kept = s.stream  # the input of the projection of queries, keys and values
    rope = shape.position == "rope"
    selective = s.settings.recompute == "selective"
    if s.fused:
        # Values are a view of the projection's output; rotated queries and keys are tensors of their own.
        kept += mixed + (t * (q + kv) * s.b if rope or shape.qk_norm else 0.0)
        kept += t * (s.heads + s.groups) * FLOAT if shape.qk_norm else 0.0
        # Its output is what the last matrix reads, so that recomputing the core brings nothing but the sums back.
        sums = FLOAT * t * s.heads
        kept += t * q * s.b + (0.0 if selective else sums)
        return Part(name="attention", kept=kept, again=t * q * s.b + sums if selective else 0.0, largest=mixed)
    if shape.qk_norm:
        whole_view = s.groups == 1  # then the queries are a view as well
        kept += t * (2 * FLOAT * (q + kv) + FLOAT * (s.heads + s.groups))
        if not s.cast:
            kept += mixed - t * kv * s.b - (t * q * s.b if whole_view else 0.0)
    if rope:
        kept += 4 * t * shape.head_dim * s.b
    # Under context parallelism the keys and values of all ranks come to each one.
    seen = t if s.cp == 1 else t * (s.cp + 0.5)
    core = (2 * t + 2 * seen) * q * s.b + FLOAT * t * s.heads
    again = 0.0
    if selective:
        # Queries and keys as the core reads them stay; values are a view of the projection's output.
        view = shape.qk_norm and not s.cast
        own = rope or shape.qk_norm
        again, core = core, t * (q + kv) * s.b * own + (0.0 if view else mixed)
        if view and s.groups == 1 and not rope:
            core -= t * q * s.b
    return Part(name="attention", kept=kept + core + t * q * s.b, again=again, largest=max(mixed, t * q * s.b))


def _latent_attention(s: _Sizes) -> Part:
    """Multi-head latent attention: compressed queries and keys with their norms, then full heads."""
    latent = s.shape.latent_attention
    assert latent is not None
    t, local, key = s.tokens, s.local, latent.nope_dim + latent.rope_dim
    q_rank, kv_rank = latent.q_rank or 0, latent.kv_rank
    normed = q_rank + kv_rank
    kept = s.stream + local * normed * s.b + local * FLOAT * (1 + bool(q_rank))  # what the up projections read
    out = t * s.heads * latent.v_dim * s.b
    if s.fused:
        kept += local * (normed + latent.rope_dim) * s.b
        core = t * s.heads * (2 * key + 2 * latent.v_dim) * s.b + FLOAT * t * s.heads
        return Part(name="latent attention", kept=kept + core, largest=t * s.heads * key * s.b)
    kept += local * FLOAT * (2 * normed + (0 if s.cast else latent.rope_dim)) + 4 * t * latent.rope_dim * s.b
    # Plain attention pads values to the width of keys.
    core, again = 4 * t * s.heads * key * s.b + FLOAT * t * s.heads, 0.0
    if s.settings.recompute == "selective":
        again, core = core, t * s.heads * (2 * key + latent.v_dim) * s.b
    return Part(name="latent attention", kept=kept + core + out, again=again, largest=t * s.heads * key * s.b)


def _dense(name: str, s: _Sizes, width: int, *, reads_input: bool = True) -> Part:
    """A feed-forward part that is cut over tensor-parallel ranks."""
    columns = width / s.tp
    return Part(
        name=name,
        kept=(s.stream if reads_input else 0.0) + s.tokens * columns * _activation_factor(s, scaled=False) * s.b,
        largest=s.tokens * columns * (2 if s.shape.gated else 1) * s.b,
    )


def _activation_factor(s: _Sizes, *, scaled: bool) -> int:
    """Tensors of a feed-forward part's width that it keeps: what the activation reads, what is multiplied, and what
    the second matrix reads. `scaled`: the result is multiplied with a probability before that."""
    if s.fused and s.shape.gated:
        return 3
    return (5 if s.shape.gated else 2) + scaled


def _experts(s: _Sizes) -> Part:
    """Router, dispatch, routed experts (balanced over ranks) and the shared expert, which all read one input."""
    shape = s.shape
    t, k = s.local, shape.experts_per_token
    kept = s.stream
    if shape.router_score == "sigmoid":
        kept += t * (shape.num_experts * FLOAT + FLOAT)
    elif not shape.norm_topk_prob:
        kept += t * shape.num_experts * FLOAT
    kept += t * (k * (INDEX + FLOAT) + shape.num_experts * (1 + FLOAT) + k * INDEX)
    # Every rank of a group of ep x etp sends k rows a token; the ranks of one expert all hold its rows.
    rows = t * k * s.etp
    width = shape.moe_latent_size or s.hidden
    kept += rows * (width * s.b + FLOAT)
    columns = shape.moe_ffn_hidden_size / s.etp
    kept += rows * columns * _activation_factor(s, scaled=True) * s.b
    if shape.moe_latent_size:  # what the two projections read
        kept += t * shape.moe_latent_size * s.b
    if shape.shared_ffn_hidden_size:
        kept += _dense("shared", s, shape.shared_ffn_hidden_size, reads_input=False).kept
    return Part(name="experts", kept=kept, largest=rows * max(width, columns * (2 if shape.gated else 1)) * s.b)


def _mamba(s: _Sizes) -> Part:
    mamba = s.shape.mamba
    assert mamba is not None
    t, tp = s.tokens, s.tp
    inner, convolved, heads = mamba.inner / tp, mamba.convolved / tp, mamba.heads / tp
    both = 2 * mamba.groups * mamba.state / tp
    projected = inner + convolved + heads
    if s.fused:
        # The projection's output, the scan's output before and behind its gate, and what the last matrix reads.
        kept = s.stream + t * (projected + 3 * inner) * s.b + FLOAT * t * mamba.groups / tp
        return Part(name="mamba", kept=kept, largest=t * projected * s.b)
    block = min(mamba.chunk, _LONGEST_BLOCK["large state" if mamba.state >= 64 else "small state"], t)
    padded = -(-t // block) * block
    scan = FLOAT * (padded * (2 * inner + both) + padded // block * inner * mamba.state)
    read = t * (convolved + inner) * FLOAT if s.cast else t * (projected + convolved) * s.b
    kept = s.stream + read + t * convolved * s.b + 2 * FLOAT * t * heads + scan
    kept += FLOAT * t * inner * (3 if s.cast else 2)
    kept += t * (2 * FLOAT * inner + FLOAT * mamba.groups / tp) + t * inner * s.b
    return Part(name="mamba", kept=kept, largest=t * projected * FLOAT)


def _head(s: _Sizes) -> Part:
    """The log-prob head: hidden states of the tokens it looks at, and a few numbers for each."""
    t = s.tokens
    return Part(name="log-prob head", kept=t * s.hidden * s.b + t * (3 * INDEX + 3 * FLOAT), largest=t * s.hidden * s.b)
