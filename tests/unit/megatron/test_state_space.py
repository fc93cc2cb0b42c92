"""The Mamba-2 mixer's computation against the recurrence it stands for, in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.megatron import state_space
from millrace.megatron.state_space import (
    RMSNorm,
    causal_conv1d,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

ROWS, LENGTH, HEADS, HEAD_DIM, GROUPS, STATE = 2, 101, 8, 6, 4, 5
BOUNDARIES = ([5, 7, 40, 64, 96], [32, 33])
"""First tokens of the sequences behind the first one, of each row."""


@dataclass
class Inputs:
    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    z: Tensor
    dt_bias: Tensor
    state: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def inputs(length: int = LENGTH, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return Inputs(
        x=normal(ROWS, length, HEADS, HEAD_DIM),
        dt=normal(ROWS, length, HEADS),
        a=(-4 * torch.rand(HEADS, generator=generator, dtype=torch.float64) - 0.1).to(dtype).requires_grad_(),
        b=normal(ROWS, length, GROUPS, STATE),
        c=normal(ROWS, length, GROUPS, STATE),
        d=normal(HEADS),
        z=normal(ROWS, length, HEADS, HEAD_DIM),
        dt_bias=normal(HEADS),
        state=normal(ROWS, HEADS, HEAD_DIM, STATE),
    )


def sequence_numbers(length: int = LENGTH) -> Tensor:
    """int32 [ROWS, length]"""
    numbers = torch.zeros(ROWS, length, dtype=torch.int32)
    for row, starts in enumerate(BOUNDARIES):
        for start in starts:
            numbers[row, start:] += 1
    return numbers


def recurrence(i: Inputs, seq_idx: Tensor | None, limit: tuple[float, float] = (0.0, float("inf"))) -> list[Tensor]:
    """Token by token: outputs [B, L, H, P] and the last state [B, H, P, N]."""
    dt = F.softplus(i.dt + i.dt_bias).clamp(*limit)
    b, c = (t.repeat_interleave(HEADS // GROUPS, dim=2) for t in (i.b, i.c))
    state, outputs = i.state, []
    for t in range(i.x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        written = (dt[:, t, :, None] * i.x[:, t])[..., None] * b[:, t, :, None]
        state = state * (dt[:, t] * i.a).exp()[..., None, None] + written
        outputs.append((state * c[:, t, :, None]).sum(-1))
    return [(torch.stack(outputs, 1) + i.x * i.d[:, None]) * F.silu(i.z), state]


def scan(i: Inputs, chunk: int, seq_idx: Tensor | None, **more: object) -> list[Tensor]:
    outputs = mamba_chunk_scan_combined(
        i.x,
        i.dt,
        i.a,
        i.b,
        i.c,
        chunk,
        D=i.d,
        z=i.z,
        dt_bias=i.dt_bias,
        initial_states=i.state,
        seq_idx=seq_idx,
        dt_softplus=True,
        return_final_states=True,
        **more,  # type: ignore[arg-type]
    )
    return list(outputs)


def gradients(outputs: list[Tensor], of: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum of the outputs with random weights."""
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    return torch.autograd.grad(sum(((w * o).sum() for w, o in zip(weights, outputs, strict=True)), torch.zeros(())), of)


def largest_difference(found: list[Tensor] | tuple[Tensor, ...], expected: list[Tensor] | tuple[Tensor, ...]) -> float:
    """Over all pairs, relative to the largest number of the expected one."""
    found, expected = ([t.detach() for t in tensors] for tensors in (found, expected))
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 31, LENGTH, 128])
@pytest.mark.parametrize("chunk", [1, 7, 32, 256])
def test_the_scan_is_the_recurrence(chunk: int, length: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(state_space._LONGEST_BLOCK, "small state", 128)
    given, seq_idx = inputs(length), sequence_numbers(length) if packed else None
    expected, found = recurrence(given, seq_idx), scan(given, chunk, seq_idx)
    assert largest_difference(found, expected) <= 1e-13
    grads = [gradients(outputs, given.tensors()) for outputs in (found, expected)]
    if length == 1:  # one token: where nothing decays into it, rounding is all there is to compare
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    else:
        assert largest_difference(*grads) <= 1e-12


def test_tiles_of_one_block_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given, seq_idx = inputs(), sequence_numbers()
    outputs = scan(given, 16, seq_idx)
    whole = [*outputs, *gradients(outputs, given.tensors())]
    monkeypatch.setattr(state_space, "_TILE_SCORES", {"cpu": 1})
    outputs = scan(given, 16, seq_idx)
    assert largest_difference([*outputs, *gradients(outputs, given.tensors())], whole) <= 1e-14


def test_a_sequence_in_a_pack_gets_what_it_gets_alone() -> None:
    given = inputs()
    packed = scan(given, 32, sequence_numbers())[0]
    start, stop = BOUNDARIES[0][2], BOUNDARIES[0][3]
    alone = Inputs(*(t[:1, start:stop] if t.dim() > 2 and t.shape[1] == LENGTH else t for t in given.tensors()))
    alone.state = torch.zeros(1, HEADS, HEAD_DIM, STATE, dtype=torch.float64)
    torch.testing.assert_close(packed[:1, start:stop], scan(alone, 32, None)[0], rtol=1e-12, atol=1e-12)


def test_what_stands_in_a_neighbour_does_not_reach_a_sequence() -> None:
    given, seq_idx = inputs(), sequence_numbers()
    first = BOUNDARIES[0][1]
    with torch.no_grad():
        before = scan(given, 32, seq_idx)[0][0, first:].clone()
        for tensor in (given.x, given.dt, given.b, given.c):
            tensor[0, :first] = 1e3
        given.state[0] = 1e3
        after = scan(given, 32, seq_idx)[0][0, first:]
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)  # sums of decays run through a whole block


def test_float32_keeps_its_digits_where_states_decay_fast() -> None:
    exact = inputs()
    with torch.no_grad():
        exact.a.mul_(4)
        exact.dt_bias.add_(1)
    single = Inputs(*(t.detach().float().requires_grad_() for t in exact.tensors()))
    outputs = [scan(exact, 64, None), scan(single, 64, None)]
    assert largest_difference(outputs[1], outputs[0]) <= 2e-6
    grads = [gradients(o, i.tensors()) for o, i in zip(outputs, (exact, single), strict=True)]
    assert largest_difference(grads[1], grads[0]) <= 2e-5


def test_time_steps_are_clamped_to_a_given_limit_and_not_otherwise() -> None:
    given = inputs()
    with torch.no_grad():
        given.dt.sub_(6)  # steps around 2e-3
    limited = recurrence(given, None, (1e-3, 5e-3))
    assert largest_difference(scan(given, 32, None, dt_limit=(1e-3, 5e-3)), limited) <= 1e-13
    free = recurrence(given, None)
    assert largest_difference(scan(given, 32, None), free) <= 1e-13
    assert largest_difference(limited, free) > 1e-2


def test_bfloat16_comes_back_as_bfloat16_and_is_computed_in_float32() -> None:
    exact = inputs()
    low = Inputs(*(t.detach().bfloat16() for t in exact.tensors()))
    found = scan(low, 32, None)[0]
    widened = Inputs(*(t.float() for t in low.tensors()))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, scan(widened, 32, None)[0].bfloat16())


def test_states_of_packed_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="no states of packed sequences"):
        scan(inputs(), 32, None, return_varlen_states=True)


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's own, for one sequence a row."""
    taps = weight.shape[1]
    padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)


def sequence_by_sequence(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    if seq_idx is None:
        return plain_convolution(x, weight, bias)
    rows = []
    for row, numbers in zip(x, seq_idx, strict=True):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        rows.append(torch.cat([plain_convolution(piece[None], weight, bias)[0] for piece in row.split(lengths)]))
    return torch.stack(rows)


@pytest.mark.parametrize("channels_at_once", [1, 1 << 17])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, LENGTH])
def test_the_convolution_is_torchs_on_each_sequence(
    length: int, packed: bool, channels_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_space, "_TILE_CHANNELS", channels_at_once)
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((ROWS, length, 7), (7, 4), (7,))
    )
    seq_idx = sequence_numbers(length) if packed else None
    found, expected = causal_conv1d(x, weight, bias, seq_idx), sequence_by_sequence(x, weight, bias, seq_idx)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    grads = [gradients([o], [x, weight, bias]) for o in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_call_is_convolution_scan_and_gate(packed: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    inner, both = HEADS * HEAD_DIM, 2 * GROUPS * STATE

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    zxbcdt, weight, bias = normal(ROWS, LENGTH, 2 * inner + both + HEADS), normal(inner + both, 4), normal(inner + both)
    dt_bias, d = normal(HEADS), normal(HEADS)
    a = (-torch.rand(HEADS, generator=generator, dtype=torch.float64)).requires_grad_()
    seq_idx = sequence_numbers() if packed else None
    found = mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, a, d, 32, seq_idx=seq_idx, headdim=HEAD_DIM, ngroups=GROUPS
    )
    z, xbc, dt = zxbcdt.split([inner, inner + both, HEADS], dim=-1)
    x, b, c = F.silu(sequence_by_sequence(xbc, weight, bias, seq_idx)).split([inner, both // 2, both // 2], dim=-1)
    parts = Inputs(
        x=x.unflatten(-1, (HEADS, HEAD_DIM)),
        dt=dt,
        a=a,
        b=b.unflatten(-1, (GROUPS, STATE)),
        c=c.unflatten(-1, (GROUPS, STATE)),
        d=d,
        z=z.unflatten(-1, (HEADS, HEAD_DIM)),
        dt_bias=dt_bias,
        state=torch.zeros(ROWS, HEADS, HEAD_DIM, STATE, dtype=torch.float64),
    )
    expected = recurrence(parts, seq_idx)[0].flatten(-2)
    assert largest_difference([found], [expected]) <= 1e-13
    own = [zxbcdt, weight, bias, dt_bias, a, d]
    assert largest_difference(gradients([found], own), gradients([expected], own)) <= 1e-12


@pytest.mark.parametrize("before", [False, True])
def test_the_norm_takes_each_group_by_itself(before: bool) -> None:
    x, z = torch.randn(3, 8), torch.randn(3, 8)
    norm = RMSNorm(8, eps=1e-3, group_size=4, norm_before_gate=before)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    gated = x if before else x * F.silu(z)
    groups = gated.unflatten(-1, (2, 4))
    expected = (groups / (groups.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * norm.weight
    torch.testing.assert_close(norm(x, z), expected * F.silu(z) if before else expected)
    groups = x.unflatten(-1, (2, 4))
    plain = (groups / (groups.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * norm.weight
    torch.testing.assert_close(norm(x), plain)


@pytest.mark.parametrize(
    ("option", "what"),
    [({"activation": "gelu"}, "silu only, not gelu"), ({"rmsnorm_weight": torch.ones(48)}, "neither the norm")],
)
def test_what_the_fused_call_cannot_do_is_refused(option: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        mamba_split_conv1d_scan_combined(
            torch.zeros(1, 4, 2 * 48 + 40 + 8),
            torch.zeros(88, 4),
            torch.zeros(88),
            torch.zeros(8),
            -torch.ones(8),
            torch.ones(8),
            16,
            headdim=HEAD_DIM,
            ngroups=GROUPS,
            **option,  # type: ignore[arg-type]
        )
