"""Scaling to FP8 and back, as Transformer Engine's recipes do it, in float32 on any device.

A tensor is multiplied by a scale that brings its largest value to the format's, rounded to the format (to the nearest,
ties to even; what lies beyond its largest number becomes that number) and divided again. Recipes differ in what shares
a scale:

    per tensor        the whole tensor; the scale comes from its own values, or from those of earlier steps
    1 x 128 blocks    128 numbers along the dimension that the product sums over
    128 x 128 blocks  a square
    MXFP8             32 numbers along that dimension, with a power of two (E8M0, that is 2^-127 to 2^127)

Blocks along a dimension give one rounded tensor for each dimension that a product sums over, both from the exact one.
Legend: R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK, MX_BLOCK = 128, 32
MX_EXPONENTS = (-127, 127)
"""What an E8M0 number can be the exponent of."""

Scale = Callable[[Tensor, torch.dtype], Tensor]
"""Largest absolute values and a format -> what the numbers are multiplied by."""


@dataclass(frozen=True)
class Rounded:
    """A matrix [R, C] after scaling, rounding and scaling back, for each dimension that a product may sum over."""

    over_columns: Tensor
    """For products that sum over C."""
    over_rows: Tensor
    """For products that sum over R."""


def through_fp8(x: Tensor, scale: Tensor, form: torch.dtype) -> Tensor:
    """x, multiplied by the scale and rounded to the format with saturation, times the scale's inverse; float32."""
    largest = torch.finfo(form).max
    return (x * scale).clamp(-largest, largest).to(form).float() * scale.reciprocal()


def exact_scale(largest: Tensor, form: torch.dtype) -> Tensor:
    """The format's largest number over the tensor's; 1 where the tensor is 0 or not finite."""
    scale = (torch.finfo(form).max / largest).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((largest > 0) & largest.isfinite(), scale, torch.ones_like(scale))


def power_of_two_scale(largest: Tensor, form: torch.dtype) -> Tensor:
    """`exact_scale`, rounded down to a power of two."""
    _, exponent = torch.frexp(exact_scale(largest, form))
    return torch.ldexp(torch.ones_like(largest), exponent - 1)


def mx_scale(largest: Tensor, form: torch.dtype) -> Tensor:
    """One over the smallest E8M0 number that brings the largest value within the format."""
    mantissa, exponent = torch.frexp(largest / torch.finfo(form).max)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # a power of two is its own upper bound
    exponent = torch.where(largest > 0, exponent, torch.full_like(exponent, MX_EXPONENTS[0])).clamp(*MX_EXPONENTS)
    return torch.ldexp(torch.ones_like(largest), -exponent)


def per_tensor(x: Tensor, form: torch.dtype, scale: Scale = exact_scale) -> Rounded:
    """One scale for all, from the largest value; x float32 [R, C] as in what follows."""
    if not x.numel():
        return Rounded(x, x)
    rounded = through_fp8(x, scale(x.abs().amax(), form), form)
    return Rounded(rounded, rounded)


def by_rows(x: Tensor, form: torch.dtype, scale: Scale, block: int) -> Rounded:
    """A scale for each `block` numbers that stand behind one another in the dimension that is summed over."""
    if not x.numel():
        return Rounded(x, x)
    return Rounded(_blocks_in_rows(x, form, scale, block), _blocks_in_rows(x.t(), form, scale, block).t())


def by_squares(x: Tensor, form: torch.dtype, scale: Scale, block: int) -> Rounded:
    """A scale for each square of `block` x `block` numbers."""
    if not x.numel():
        return Rounded(x, x)
    rows, columns = x.shape
    whole = F.pad(x, (0, -columns % block, 0, -rows % block))
    squares = whole.view(whole.shape[0] // block, block, whole.shape[1] // block, block)
    scales = scale(squares.abs().amax(dim=(1, 3), keepdim=True), form)
    rounded = through_fp8(squares, scales, form).view_as(whole)[:rows, :columns]
    return Rounded(rounded, rounded)


def _blocks_in_rows(x: Tensor, form: torch.dtype, scale: Scale, block: int) -> Tensor:
    rows, columns = x.shape
    blocks = F.pad(x, (0, -columns % block)).reshape(rows, -1, block)
    scales = scale(blocks.abs().amax(dim=-1, keepdim=True), form)
    return through_fp8(blocks, scales, form).reshape(rows, -1)[:, :columns]
