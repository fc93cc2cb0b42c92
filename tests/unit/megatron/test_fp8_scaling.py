"""FP8's roundings against references that know the formats by their bits alone, in float64, number by number."""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from millrace.config.schema import PrecisionConfig
from millrace.megatron.fp8_emulation import emulated_linear, operands
from millrace.megatron.fp8_scaling import (
    E4M3,
    E5M2,
    by_rows,
    by_squares,
    exact_scale,
    mx_scale,
    per_tensor,
    power_of_two_scale,
    through_fp8,
)

FORMATS = {"e4m3": (4, 3, 7, 448.0), "e5m2": (5, 2, 15, 57344.0)}
"""Bits of exponent and mantissa, bias, largest number."""


def numbers_of(form: str) -> list[float]:
    """Every number that is not negative, from the definition of a floating-point format."""
    exponent_bits, mantissa_bits, bias, largest = FORMATS[form]
    steps = 2**mantissa_bits
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(steps):
            if exponent == 0:
                value = math.ldexp(mantissa / steps, 1 - bias)
            else:
                value = math.ldexp(1 + mantissa / steps, exponent - bias)
            if value <= largest:
                found.append(value)
    return found


GRIDS = {form: numbers_of(form) for form in FORMATS}


def nearest(value: float, form: str) -> float:
    """The number of the format next to a value, of two that are equally near the one whose last bit is 0."""
    grid = GRIDS[form]
    size = min(abs(value), grid[-1])
    place = min(range(len(grid)), key=lambda i: (abs(grid[i] - size), i % 2))
    return math.copysign(grid[place], value)


def reference(x: Tensor, groups: Iterator[list[tuple[int, int]]], form: str, scale_of: object) -> Tensor:
    """x in float64, rounded group by group with the scale that `scale_of` gives a group's largest value."""
    result = torch.full(x.shape, float("nan"), dtype=torch.float64)
    for places in groups:
        scale = scale_of(max(abs(float(x[place])) for place in places), FORMATS[form][3])
        for place in places:
            result[place] = nearest(float(x[place]) * scale, form) / scale
    return result


def exact(largest: float, top: float) -> float:
    return float(torch.tensor(top / largest, dtype=torch.float32)) if largest else 1.0


def power_of_two(largest: float, top: float) -> float:
    """The largest power of two by which the largest value stays within the format; found by trying."""
    if not largest:
        return 1.0
    return max(2.0**e for e in range(-100, 100) if Fraction(largest) * Fraction(2) ** e <= Fraction(top))


def row_blocks(rows: int, columns: int, block: int) -> Iterator[list[tuple[int, int]]]:
    for row in range(rows):
        for start in range(0, columns, block):
            yield [(row, c) for c in range(start, min(start + block, columns))]


def column_blocks(rows: int, columns: int, block: int) -> Iterator[list[tuple[int, int]]]:
    for places in row_blocks(columns, rows, block):
        yield [(row, column) for column, row in places]


def squares(rows: int, columns: int, block: int) -> Iterator[list[tuple[int, int]]]:
    for top in range(0, rows, block):
        for left in range(0, columns, block):
            yield [(r, c) for r in range(top, min(top + block, rows)) for c in range(left, min(left + block, columns))]


def whole(rows: int, columns: int) -> Iterator[list[tuple[int, int]]]:
    yield [(r, c) for r in range(rows) for c in range(columns)]


def sample(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Numbers over many orders of magnitude, with a zero row and an outlier."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=drawn) * torch.logspace(-4, 1, columns)
    x[0] = 0
    x[-1, 0] = 300.0
    return x


def same(measured: Tensor, expected: Tensor) -> None:
    """Equal but for the float32 in which a scale's inverse is kept."""
    torch.testing.assert_close(measured.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("form", FORMATS)
def test_every_number_of_a_format_stays_and_those_between_go_to_the_nearest_even(form: str) -> None:
    torch_form, grid = {"e4m3": E4M3, "e5m2": E5M2}[form], GRIDS[form]
    values = [*grid, *((a + b) / 2 for a, b in pairwise(grid))]
    values += [*(value * 1.0001 for value in grid), grid[-1] * 1.5, 1e30]
    x = torch.tensor([*values, *(-value for value in values)], dtype=torch.float32)
    rounded = through_fp8(x, torch.ones(()), torch_form)
    assert rounded.tolist() == [nearest(float(value), form) for value in x]
    assert {math.inf, -math.inf}.isdisjoint(rounded.tolist())


@pytest.mark.parametrize(("form", "torch_form"), [("e4m3", E4M3), ("e5m2", E5M2)])
def test_one_scale_a_tensor(form: str, torch_form: torch.dtype) -> None:
    x = sample(9, 14)
    rounded = per_tensor(x, torch_form)
    same(rounded.over_columns, reference(x, whole(9, 14), form, exact))
    assert rounded.over_rows is rounded.over_columns


@pytest.mark.parametrize(("scale", "by"), [(exact_scale, exact), (power_of_two_scale, power_of_two)])
def test_blocks_lie_along_the_dimension_that_is_summed_over(scale: object, by: object) -> None:
    x = sample(21, 37)
    rounded = by_rows(x, E4M3, scale, block=16)
    same(rounded.over_columns, reference(x, row_blocks(21, 37, 16), "e4m3", by))
    same(rounded.over_rows, reference(x, column_blocks(21, 37, 16), "e4m3", by))


@pytest.mark.parametrize(("scale", "by"), [(exact_scale, exact), (power_of_two_scale, power_of_two)])
def test_squares_serve_both_dimensions(scale: object, by: object) -> None:
    x = sample(21, 37)
    rounded = by_squares(x, E4M3, scale, block=16)
    same(rounded.over_columns, reference(x, squares(21, 37, 16), "e4m3", by))
    assert rounded.over_rows is rounded.over_columns


def test_mxfp8_scales_by_powers_of_two_that_let_nothing_saturate() -> None:
    x = sample(7, 70)
    for form, torch_form in (("e4m3", E4M3), ("e5m2", E5M2)):
        rounded = by_rows(x, torch_form, mx_scale, block=32)
        same(rounded.over_columns, reference(x, row_blocks(7, 70, 32), form, power_of_two))
        same(rounded.over_rows, reference(x, column_blocks(7, 70, 32), form, power_of_two))


def test_mxfp8_scales_stay_within_eight_bits_of_exponent() -> None:
    largest = torch.tensor([0.0, 448.0, 448.0 * 2**-3, 449.0, 1e-38, 1e-45, 3e38])
    exponents = torch.log2(mx_scale(largest, E4M3).double()).tolist()
    assert exponents[0] == 127 and exponents[1:4] == [0, 3, -1]
    assert all(-127 <= exponent <= 127 and exponent == round(exponent) for exponent in exponents)


def test_tensors_of_zeros_of_nothing_and_of_infinities_are_left_to_themselves() -> None:
    for scale in (exact_scale, power_of_two_scale, mx_scale):
        assert torch.equal(by_rows(torch.zeros(3, 5), E4M3, scale, 4).over_columns, torch.zeros(3, 5))
    assert by_rows(torch.zeros(0, 5), E4M3, mx_scale, 4).over_rows.shape == (0, 5)
    assert exact_scale(torch.tensor(math.inf), E4M3) == 1
    assert torch.isfinite(per_tensor(torch.full((2, 2), 1e-45), E4M3).over_rows).all()


RECIPES = {
    "tensorwise": PrecisionConfig(fp8="tensorwise"),
    "tensorwise e4m3": PrecisionConfig(fp8="tensorwise", format="e4m3"),
    "blockwise": PrecisionConfig(fp8="blockwise"),
    "blockwise float32": PrecisionConfig(fp8="blockwise", power_of_two_scales=False),
    "mxfp8": PrecisionConfig(fp8="mxfp8"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_linear_and_its_gradients_are_products_of_what_the_recipe_rounds(name: str) -> None:
    """130 and 150 tokens and channels: more than one block of 128, of which the last is not full."""
    precision, torch_seed = RECIPES[name], 3
    drawn = torch.Generator().manual_seed(torch_seed)
    x, w, g = (torch.randn(shape, generator=drawn) for shape in ((13, 150), (9, 150), (13, 9)))
    if name.startswith("blockwise"):
        x, w, g = (torch.randn(shape, generator=drawn) for shape in ((130, 6), (5, 6), (130, 5)))
    rounded = _reference_operands(name, x, w, g)
    x.requires_grad_(), w.requires_grad_()
    y = emulated_linear(x, w, operands(precision))
    y.backward(g)
    torch.testing.assert_close(y.detach().double(), rounded["x"] @ rounded["w"].t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), rounded["g"] @ rounded["w over O"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(w.grad.double(), rounded["g over T"].t() @ rounded["x over T"], rtol=1e-5, atol=1e-4)
    assert not torch.allclose(y, x @ w.t(), rtol=1e-4), "nothing was rounded"


def _reference_operands(name: str, x: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    form = "e5m2" if name == "tensorwise" else "e4m3"
    if name.startswith("tensorwise"):
        x, w, g = (reference(t, whole(*t.shape), f, exact) for t, f in ((x, "e4m3"), (w, "e4m3"), (g, form)))
        return {"x": x, "w": w, "g": g, "w over O": w, "g over T": g, "x over T": x}
    block, scale = (32, power_of_two) if name == "mxfp8" else (128, power_of_two if name == "blockwise" else exact)
    rows = {k: reference(t, row_blocks(*t.shape, block), form, scale) for k, t in (("x", x), ("w", w), ("g", g))}
    columns = {
        f"{k} over {d}": reference(t, column_blocks(*t.shape, block), form, scale)
        for k, t, d in (("x", x, "T"), ("w", w, "O"), ("g", g, "T"))
    }
    if block == 128:
        rows["w"] = columns["w over O"] = reference(w, squares(*w.shape, block), form, scale)
    return rows | columns


def test_a_frozen_weight_and_a_first_input_get_no_gradient() -> None:
    x, w = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    emulated_linear(x, w, operands(RECIPES["mxfp8"])).sum().backward()
    assert x.grad is None and w.grad is not None
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8)
    emulated_linear(x, w, operands(RECIPES["mxfp8"])).sum().backward()
    assert x.grad is not None and w.grad is None


def test_results_have_the_type_and_shape_of_the_model() -> None:
    x = torch.randn(5, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    y = emulated_linear(x, w, operands(RECIPES["blockwise"]))
    y.sum().backward()
    assert y.shape == (5, 1, 3)
    assert {y.dtype, x.grad.dtype, w.grad.dtype} == {torch.bfloat16}
