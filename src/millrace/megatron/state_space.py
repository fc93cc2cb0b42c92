"""The Mamba-2 mixer's computation in plain torch: what Megatron-Core takes from mamba_ssm, whose kernels need CUDA.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,        y_t = C_t h_t + D x_t         (state-space duality, SSD:
                                                                                      Dao and Gu, arXiv 2405.21060)

The scan cuts the tokens into blocks. Within a block it is an attention without softmax, whose scores C_t . B_s are
decayed by exp(sum of dt A between s and t); from block to block one state is handed on. Which block a token falls into
changes no result, only the time. The backward is written out: it keeps the inputs and the states between the blocks and
computes the scores anew.

`mamba_split_conv1d_scan_combined`, `mamba_chunk_scan_combined` and `RMSNorm` carry mamba_ssm's names and arguments, so
that Megatron-Core's MambaMixer runs on them (see `megatron.gaps`). A packed micro-batch names the sequence of each
token in `seq_idx`, whose numbers must not fall: convolution and state start anew with each sequence.

The time step is dt = softplus(raw + dt_bias), clamped to `dt_limit`, which is (0, inf), no clamp, unless the caller
says otherwise. Megatron-Core never says otherwise, and neither does vLLM 0.32 (mixer2 passes (0, inf) to its prefill
and its decode step has no limit at all), so that trainer and rollout engine agree, with each other and with the
`time_step_limit` of the released configurations. transformers 5.19 does not read that key: its NemotronH forward over
whole sequences clamps to (time_step_min, inf), where time_step_min was meant for the initialisation, while its
one-token step of `generate` does not clamp. A comparison with transformers therefore sets `time_step_min` to 0.

Legend: B batch, L tokens, H heads, P channels of a head, G groups, R = H / G heads of a group, N state size,
K taps of the convolution, C its channels; Z blocks (of all rows of the batch), Q tokens of a block.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

NO_LIMIT = (0.0, math.inf)

_LONGEST_BLOCK = {"small state": 32, "large state": 64}
"""Tokens of a block at most on CPUs, measured: scores cost Q a token, states N a token and block. GPUs prefer the 128
or 256 that `chunk_size` says."""
_LARGE_STATE = 64

_TILE_SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Scores that exist at one time: as many blocks are worked on together. On CPUs they stay in the cache (1 MiB in
float32); on a GPU (256 MiB) they are enough to fill it."""

_TILE_CHANNELS = 1 << 17
"""Numbers of one slice of a convolution's input: all taps pass over it while it is in the cache."""


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """Convolution, scan and gate of a mixer: zxbcdt [B, L, 2 HP + 2 GN + H] -> [B, L, HP], with the final states
    [B, H, P, N] when asked for.

    `conv1d_weight` is [C, K] with C = HP + 2 GN, `dt_bias`, `A` (negative) and `D` are [H], `D` or [H, P]. The norm and
    the output projection that mamba_ssm can fuse in here are left to the caller: ValueError when one is given.
    """
    if activation not in ("silu", "swish"):
        raise ValueError(f"the state-space scan in plain torch has the activation silu only, not {activation}")
    if rmsnorm_weight is not None or outproj_weight is not None or outproj_bias is not None:
        raise ValueError("the state-space scan in plain torch fuses neither the norm nor the output projection")
    heads = dt_bias.shape[0]
    head_dim = D.shape[1] if headdim is None else headdim
    inner = heads * head_dim
    both = conv1d_weight.shape[0] - inner  # B and C
    z, xbc, dt = zxbcdt.split([inner, inner + both, heads], dim=-1)
    xbc = F.silu(causal_conv1d(xbc, conv1d_weight, conv1d_bias, seq_idx))
    x, b, c = xbc.split([inner, both // 2, both // 2], dim=-1)
    outputs = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, head_dim)),
        dt,
        A,
        b.unflatten(-1, (ngroups, -1)),
        c.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, head_dim)),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    if return_final_states:
        return outputs[0].flatten(-2), outputs[1]
    return outputs.flatten(-2)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """The scan: x [B, L, H, P], dt [B, L, H], A [H], B and C [B, L, G, N] -> [B, L, H, P] in x's type, with the state
    after the last token [B, H, P, N] when `return_final_states`.

    `D` [H] or [H, P] adds D x, `z` [B, L, H, P] multiplies the output by silu(z), `initial_states` [B, H, P, N] belong
    to the first sequence of each row. At least float32 is used inside. States of every packed sequence are wanted by
    Megatron-Core's inference only: ValueError.
    """
    if return_varlen_states:
        raise ValueError("the state-space scan in plain torch trains; it returns no states of packed sequences")
    exact = torch.promote_types(x.dtype, torch.float32)
    out_dtype, state_size = x.dtype, B.shape[-1]
    x, dt, A, B, C = (t.to(exact) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(exact)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit != NO_LIMIT:
        dt = dt.clamp(*dt_limit)
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], *x.shape[2:], state_size)
    block = min(chunk_size, x.shape[1])
    if x.device.type == "cpu":
        block = min(block, _LONGEST_BLOCK["large state" if state_size >= _LARGE_STATE else "small state"])
    y, state = _Scan.apply(x * dt[..., None], dt * A, B, C, initial_states.to(exact), seq_idx, block)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None]).to(exact)
    if z is not None:
        y = y * F.silu(z.to(exact))
    return (y.to(out_dtype), state) if return_final_states else y.to(out_dtype)


class _Blocks:
    """The tokens of a batch in blocks, and how much of what a token leaves behind reaches another place.

    `decay` [Z, G, R, Q], float64, is the sum of dt A from the start of the block up to each token. The factors:

        scores     within a block token s reaches t: exp(decay_t - decay_s), for s <= t of the same sequence
        arriving   [Z, G, R, Q] the state before the block reaches t
        leaving    [Z, G, R, Q] token s reaches the state behind the block
        passing    [Z, G, R] the state before the block reaches the one behind it
    """

    def __init__(self, log_decay: Tensor, groups: int, block: int, seq_idx: Tensor | None) -> None:
        self.rows, self.length, heads = log_decay.shape
        self.groups, self.block, self.dtype = groups, block, log_decay.dtype
        self.padding = -self.length % block  # decay 1 and input 0: they change nothing
        self.of_row = (self.length + self.padding) // block
        # Differences of long sums: in float32 a fast decay would leave few digits of the difference of two neighbours.
        self.decay = self.heads_first(log_decay[..., None]).squeeze(-1).double().cumsum(-1)
        last = self.decay[..., -1:]
        self.arriving = self.decay.exp().to(self.dtype)
        self.leaving = (last - self.decay).exp().to(self.dtype)
        self.passing = last[..., 0].exp().to(self.dtype)
        causal = torch.ones(block, block, dtype=torch.bool, device=log_decay.device).tril()
        self.unreachable = ~causal.expand(self.rows * self.of_row, 1, 1, block, block)
        if seq_idx is not None:
            self._part_sequences(seq_idx.expand(self.rows, self.length))
        tile = max(1, _TILE_SCORES[log_decay.device.type] // (heads * block * block))
        self.tiles = [slice(z, z + tile) for z in range(0, self.rows * self.of_row, tile)]

    def _part_sequences(self, seq_idx: Tensor) -> None:
        padded = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, self.padding)], dim=1)
        sequence = padded.view(self.rows, self.of_row, self.block)
        last = sequence[..., -1]
        before = torch.cat([sequence[:, :1, 0], last[:, :-1]], dim=1)  # the initial state belongs to the first one
        same = sequence[..., :, None] == sequence[..., None, :]
        self.unreachable = self.unreachable | ~same.view_as(self.unreachable)
        self.arriving = self.arriving * (sequence == before[..., None]).view(-1, 1, 1, self.block)
        self.leaving = self.leaving * (sequence == last[..., None]).view(-1, 1, 1, self.block)
        self.passing = self.passing * (last == before).view(-1, 1, 1)

    def heads_first(self, x: Tensor) -> Tensor:
        """[B, L, H, P] -> [Z, G, R, Q, P]"""
        x = F.pad(x, (0, 0, 0, 0, 0, self.padding))
        return x.reshape(-1, self.block, self.groups, x.shape[2] // self.groups, x.shape[3]).permute(0, 2, 3, 1, 4)

    def groups_first(self, x: Tensor) -> Tensor:
        """[B, L, G, N] -> [Z, G, Q, N]"""
        return self.heads_first(x).squeeze(2)

    def tokens_first(self, x: Tensor) -> Tensor:
        """[Z, G, R, Q, P] -> [B, L, H, P], or [Z, G, Q, N] -> [B, L, G, N]"""
        x = x.unsqueeze(2) if x.dim() == 4 else x
        whole = x.permute(0, 3, 1, 2, 4).reshape(self.rows, -1, x.shape[1] * x.shape[2], x.shape[4])
        return whole[:, : self.length]

    def decays(self, tile: slice) -> Tensor:
        """Factors within the blocks of a tile [Z, G, R, Q, Q], from the last index to the one before."""
        decay = self.decay[tile]
        difference = (decay[..., :, None] - decay[..., None, :]).to(self.dtype)
        return difference.masked_fill_(self.unreachable[tile], -math.inf).exp_()


class _Scan(torch.autograd.Function):
    """x [B, L, H, P] (times dt), log_decay [B, L, H], b and c [B, L, G, N], state [B, H, P, N] -> y [B, L, H, P] and
    the state after the last token.

    y is what a token gets from its block plus `read`, what it gets from the state before the block. For the gradient of
    the decays: raising `decay` at one token multiplies what it gets by exp of the change, and what others get from it
    by exp of its negative.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        log_decay: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor,
        seq_idx: Tensor | None,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(log_decay, b.shape[2], block, seq_idx)
        xs, bs, cs = blocks.heads_first(x), blocks.groups_first(b), blocks.groups_first(c)
        xs, bs, cs = xs.contiguous(), bs.contiguous(), cs.contiguous()
        z, g, r, _, p = xs.shape
        y = torch.empty_like(xs)
        left = xs.new_empty(z, g, r * p, bs.shape[-1])
        for tile in blocks.tiles:
            scores = blocks.decays(tile).mul_((cs[tile] @ bs[tile].mT)[:, :, None])
            y[tile] = scores @ xs[tile]
            left[tile] = _wide(xs[tile] * blocks.leaving[tile][..., None]).mT @ bs[tile]
        arrived, last = _hand_on(state, left.view(z, g, r, p, -1), blocks)
        read = torch.empty_like(y)
        for tile in blocks.tiles:
            read[tile] = _narrow(cs[tile] @ arrived[tile].flatten(2, 3).mT, r) * blocks.arriving[tile][..., None]
            y[tile] += read[tile]
        ctx.save_for_backward(xs, bs, cs, read, arrived)
        ctx.blocks = blocks  # type: ignore[attr-defined]
        return blocks.tokens_first(y), last.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_tokens: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        xs, bs, cs, read, arrived = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        r, p = xs.shape[2], xs.shape[4]
        dy = blocks.heads_first(dy_tokens).contiguous()
        dx, db, dc = torch.empty_like(xs), torch.empty_like(bs), torch.empty_like(cs)
        d_decay = (read * dy).sum(-1)
        d_arrived = torch.empty_like(arrived)
        for tile in blocks.tiles:
            d_read = _wide(dy[tile] * blocks.arriving[tile][..., None])
            dc[tile] = d_read @ arrived[tile].flatten(2, 3)
            d_arrived[tile] = (d_read.mT @ cs[tile]).unflatten(2, (r, p))
        d_left, d_passing, d_state = _hand_back(d_last, d_arrived, arrived, blocks)
        d_decay[..., -1] += d_passing * blocks.passing
        for tile in blocks.tiles:
            leaving, d_left_wide = blocks.leaving[tile][..., None], d_left[tile].flatten(2, 3)
            products, decays = (cs[tile] @ bs[tile].mT)[:, :, None], blocks.decays(tile)
            d_scores = (dy[tile] @ xs[tile].mT).mul_(decays)
            d_products = d_scores.sum(2)
            dx[tile] = decays.mul_(products).mT @ dy[tile]
            d_scores.mul_(products).diagonal(dim1=-2, dim2=-1).zero_()  # a token reaches itself without decay
            dx_left = _narrow(bs[tile] @ d_left_wide.mT, r).mul_(leaving)
            dx[tile] += dx_left
            d_leaving = (dx_left * xs[tile]).sum(-1)
            d_decay[tile] += d_scores.sum(-1) - d_scores.sum(-2) - d_leaving
            d_decay[tile, ..., -1] += d_leaving.sum(-1)
            dc[tile] += d_products @ bs[tile]
            db[tile] = d_products.mT @ cs[tile] + _wide(xs[tile] * leaving) @ d_left_wide
        d_log_decay = d_decay.flip(-1).cumsum(-1).flip(-1)[..., None]
        dx, d_log_decay, db, dc = (blocks.tokens_first(t) for t in (dx, d_log_decay, db, dc))
        return dx, d_log_decay.squeeze(-1), db, dc, d_state.view_as(d_last), None, None


def _wide(x: Tensor) -> Tensor:
    """[Z, G, R, Q, P] -> [Z, G, Q, RP]: the heads of a group side by side, for one product with their shared B or C."""
    return x.transpose(2, 3).flatten(3)


def _narrow(x: Tensor, heads: int) -> Tensor:
    """[Z, G, Q, RP] -> [Z, G, R, Q, P]"""
    return x.unflatten(3, (heads, -1)).transpose(2, 3)


def _hand_on(state: Tensor, left: Tensor, blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """What arrives at each block [Z, G, R, P, N], and the state behind the last one [B, G, R, P, N].

    `left` [Z, G, R, P, N] is what each block adds by itself.
    """
    state = state.view(blocks.rows, *left.shape[1:])
    arrived = torch.empty_like(left)
    steps = zip(_by_row(arrived, blocks), _by_row(left, blocks), _by_row(blocks.passing, blocks), strict=True)
    for arriving, own, passing in steps:
        arriving.copy_(state)
        state = torch.addcmul(own, state, passing[..., None, None])
    return arrived, state


def _hand_back(d_last: Tensor, d_arrived: Tensor, arrived: Tensor, blocks: _Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `left`, of `passing` and of the state before the first block; the reverse of `_hand_on`."""
    d_state = d_last.reshape(blocks.rows, *arrived.shape[1:])
    d_left, d_passing = torch.empty_like(arrived), torch.empty_like(blocks.passing)
    for_each = (d_left, d_passing, d_arrived, arrived, blocks.passing)
    steps = list(zip(*(_by_row(t, blocks) for t in for_each), strict=True))
    for d_own, d_pass, d_read, arriving, passing in reversed(steps):
        d_own.copy_(d_state)
        d_pass.copy_((d_state * arriving).sum((-1, -2)))
        d_state = torch.addcmul(d_read, d_state, passing[..., None, None])
    return d_left, d_passing, d_state


def _by_row(x: Tensor, blocks: _Blocks) -> tuple[Tensor, ...]:
    """[Z, ...] -> views [B, ...], the n-th of the n-th block of all rows."""
    return x.view(blocks.rows, blocks.of_row, *x.shape[1:]).unbind(1)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution: x [B, L, C], weight [C, K], bias [C] -> [B, L, C] in x's type.

    y_t = bias + sum over k of weight[:, K - 1 - k] x_{t - k}, over the tokens of t's own sequence.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    segments = _segments(x, seq_idx)
    return _Convolution.apply(x.to(exact), weight.to(exact), bias.to(exact), segments).to(x.dtype)


def _segments(x: Tensor, seq_idx: Tensor | None) -> list[tuple[int, int]]:
    """First and last-plus-one token of each sequence, counted through all rows of the batch."""
    rows, length = x.shape[:2]
    starts = torch.zeros(rows, length, dtype=torch.bool, device=x.device)
    starts[:, 0] = True
    if seq_idx is not None:
        starts[:, 1:] |= seq_idx[:, 1:] != seq_idx[:, :-1]
    return list(itertools.pairwise([*starts.flatten().nonzero().flatten().tolist(), rows * length]))


class _Convolution(torch.autograd.Function):
    """x [B, L, C], weight [C, K], bias [C] -> [B, L, C], slice by slice so that all taps find x in the cache."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, segments: list[tuple[int, int]]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.segments = segments  # type: ignore[attr-defined]
        taps, tokens = weight.t().flip(0).contiguous(), x.flatten(0, 1)  # taps[k] looks back k tokens
        y = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        for first, start, stop, _ in _slices(segments, x.shape[-1]):
            torch.addcmul(bias, tokens[start:stop], taps[0], out=y[start:stop])
            for back in range(1, len(taps)):
                begin = max(start, first + back)
                if begin < stop:
                    y[begin:stop].addcmul_(tokens[begin - back : stop - back], taps[back])
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps, tokens, dy = weight.t().flip(0).contiguous(), x.flatten(0, 1), dy.flatten(0, 1)
        dx, d_taps = torch.empty_like(dy, memory_format=torch.contiguous_format), torch.zeros_like(taps)
        for first, start, stop, end in _slices(ctx.segments, x.shape[-1]):
            torch.mul(dy[start:stop], taps[0], out=dx[start:stop])
            d_taps[0] += (dy[start:stop] * tokens[start:stop]).sum(0)
            for back in range(1, len(taps)):
                ahead, begin = min(stop, end - back), max(start, first + back)
                if start < ahead:
                    dx[start:ahead].addcmul_(dy[start + back : ahead + back], taps[back])
                if begin < stop:
                    d_taps[back] += (dy[begin:stop] * tokens[begin - back : stop - back]).sum(0)
        return dx.view(x.shape), d_taps.flip(0).t(), dy.sum(0), None


def _slices(segments: list[tuple[int, int]], channels: int) -> list[tuple[int, int, int, int]]:
    """Slices of the segments that fit the cache: the segment's first token, the slice's bounds, the segment's end."""
    step = max(1, _TILE_CHANNELS // channels)
    return [(a, start, min(start + step, z), z) for a, z in segments for start in range(a, z, step)]


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over groups of channels, gated: x [..., HP], gate z of the same shape -> [..., HP].

    With `norm_before_gate` the result is norm(x) silu(z), otherwise norm(x silu(z)); without z there is no gate. Each
    `group_size` channels are normalised by themselves, so that a tensor-parallel rank with whole groups needs no other.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.norm_before_gate = eps, norm_before_gate
        self.group_size = hidden_size if group_size is None else group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)  # as in mamba_ssm, whose checkpoints name none

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        gate = None if z is None else F.silu(z.to(exact))
        y = x.to(exact)
        if gate is not None and not self.norm_before_gate:
            y = y * gate
        y = F.rms_norm(y.unflatten(-1, (-1, self.group_size)), (self.group_size,), None, self.eps).flatten(-2)
        y = y * self.weight.to(exact)
        if gate is not None and self.norm_before_gate:
            y = y * gate
        return y.to(x.dtype)
