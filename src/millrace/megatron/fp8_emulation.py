"""An emulation of FP8 on CPU ranks: the linear layers' products with operands rounded to FP8.

    forward             y  = x  W^T        over the inputs I of the linear
    input gradient      dx = dy W          over its outputs O
    weight gradient     dW = dy^T x        over the tokens T

Each operand is rounded by `fp8_scaling` as the recipe says, x and W to E4M3, dy to E4M3 or, in the hybrid format, to
E5M2; the products themselves are taken in float32 and rounded to the model's type. Transformer Engine's roundings are
thereby the same; the order of its sums, and the shorter accumulators of some GPUs, are not emulated. Neither are FP8
weights, which hold no other numbers than weights that are rounded at each use, nor the padding of micro-batches to
multiples of 16 to 128 tokens: it repeats tokens, which changes no scale but that of the last block of tokens.

Delayed scaling takes its scales from the largest values of earlier steps, over all micro-batches and all ranks.
Transformer Engine moves its history on after each micro-batch: with one micro-batch a step the two are the same. A
fresh history, as at the start of each stage, has the scale 1; Transformer Engine has one at its first step alone.
Checkpoints hold the history, so that a resumed run goes on bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import PrecisionConfig
from millrace.megatron.fp8_scaling import (
    BLOCK,
    E4M3,
    E5M2,
    MX_BLOCK,
    Rounded,
    by_rows,
    by_squares,
    exact_scale,
    mx_scale,
    per_tensor,
    power_of_two_scale,
    through_fp8,
)
from millrace.megatron.gaps import DuplicatedLinear
from millrace.megatron.topology import Topology
from millrace.megatron.weights import CanonicalNames

log = logging.getLogger(__name__)


class Round(Protocol):
    def __call__(self, x: Tensor) -> Rounded:
        """Round a matrix of float32."""


@dataclass(frozen=True)
class Operands:
    """How the operands of one linear's products are rounded."""

    input: Round
    weight: Round
    gradient: Round


def operands(precision: PrecisionConfig) -> Operands:
    """The roundings of a recipe whose scales come from the tensors themselves."""
    gradient = E5M2 if precision.chosen_format == "hybrid" else E4M3
    if precision.fp8 == "tensorwise":
        whole = partial(per_tensor, form=E4M3)
        return Operands(whole, whole, partial(per_tensor, form=gradient))
    if precision.fp8 == "blockwise":
        scale = power_of_two_scale if precision.power_of_two_scales else exact_scale
        rows = partial(by_rows, scale=scale, block=BLOCK)
        squares = partial(by_squares, form=E4M3, scale=scale, block=BLOCK)
        return Operands(partial(rows, form=E4M3), squares, partial(rows, form=gradient))
    if precision.fp8 == "mxfp8":
        rows = partial(by_rows, scale=mx_scale, block=MX_BLOCK)
        forward = partial(rows, form=E4M3)
        return Operands(forward, forward, partial(rows, form=gradient))
    raise ValueError(f"{precision.fp8} has no scales of its own tensors")


class EmulatedProduct(torch.autograd.Function):
    """x [T, I], W [O, I] -> x W^T [T, O], with rounded operands in all three products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Operands) -> Tensor:
        rounded_x, rounded_weight = rounding.input(x.float()), rounding.weight(weight.float())
        ctx.rounding, ctx.types = rounding, (x.dtype, weight.dtype)
        ctx.save_for_backward(rounded_x.over_rows, rounded_weight.over_rows)
        return (rounded_x.over_columns @ rounded_weight.over_columns.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rounded = ctx.rounding.gradient(gradient.float())
        dx = (rounded.over_columns @ weight).to(ctx.types[0]) if ctx.needs_input_grad[0] else None
        dw = (rounded.over_rows.t() @ x).to(ctx.types[1]) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def emulated_linear(x: Tensor, weight: Tensor, rounding: Operands) -> Tensor:
    """x [..., I], weight [O, I] -> [..., O]."""
    flat = EmulatedProduct.apply(x.reshape(-1, x.shape[-1]), weight, rounding)
    return flat.reshape(*x.shape[:-1], weight.shape[0])


class AmaxHistory:
    """Largest absolute values of every linear's operands over the last steps, and the scales that come of them.

    Every rank holds those of the whole model, so that a checkpoint fits any layout.
    """

    def __init__(self, names: list[str], precision: PrecisionConfig) -> None:
        self.names = names
        """Linears of the whole model, by what the mapping calls their weights."""
        self.algorithm, self.margin = precision.amax_algorithm, precision.margin
        gradient = E5M2 if precision.chosen_format == "hybrid" else E4M3
        self.forms = (E4M3, E4M3, gradient)
        self.length = precision.amax_history
        self.reset()

    def reset(self) -> None:
        """No values, and scales of 1."""
        count = len(self.names)
        self.values = torch.zeros(count, 3, self.length)
        """The newest first."""
        self.scales = torch.ones(count, 3)
        self.seen = torch.zeros(count, 3)
        """Of this step, on this rank: of inputs, weights and gradients."""

    def operands(self, name: str, linear: torch.nn.Module) -> Operands:
        """The roundings of one linear. Its values are seen while it is in training mode: passes for log-probs leave no
        trace, and an activation that is computed again has the scale that it had at first."""
        index = self.names.index(name)
        return Operands(*(partial(self._round, linear=linear, index=index, operand=operand) for operand in range(3)))

    def _round(self, x: Tensor, linear: torch.nn.Module, index: int, operand: int) -> Rounded:
        if not x.numel():
            return Rounded(x, x)
        if linear.training:
            self.seen[index, operand] = torch.maximum(self.seen[index, operand], x.abs().amax())
        rounded = through_fp8(x, self.scales[index, operand], self.forms[operand])
        return Rounded(rounded, rounded)

    def advance(self) -> None:
        """The step is over: its largest values, over all ranks, enter the history. Collective."""
        dist.all_reduce(self.seen, op=dist.ReduceOp.MAX)
        self.values = torch.cat([self.seen[..., None], self.values[..., :-1]], dim=-1)
        largest = self.values.amax(-1) if self.algorithm == "max" else self.values[..., 0]
        for operand, form in enumerate(self.forms):
            values = largest[:, operand]
            fresh = exact_scale(values, form) / 2**self.margin
            usable = (values > 0) & values.isfinite()
            self.scales[:, operand] = torch.where(usable, fresh, self.scales[:, operand])
        self.seen = torch.zeros_like(self.seen)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"names": self.names, "values": self.values, "scales": self.scales}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave. Raises ValueError for that of other linears, or of another length."""
        if state["names"] != self.names or state["values"].shape != self.values.shape:
            raise ValueError("the history is of other linears, or of another length (precision.amax_history)")
        self.reset()
        self.values, self.scales = state["values"].clone(), state["scales"].clone()


class Fp8Emulation:
    """The emulated linears of a model on this rank."""

    def __init__(
        self, model: torch.nn.Module, precision: PrecisionConfig, shape: ModelShape, topology: Topology
    ) -> None:
        """Let the model's linear layers compute with operands that are rounded to FP8. Collective with delayed."""
        names = CanonicalNames(shape, topology)
        linears = {names(f"{name}.weight"): linear for name, linear in _linears(model, precision, shape)}
        self.history: AmaxHistory | None = None
        """Of delayed scaling."""
        if precision.fp8 == "delayed":
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, list(linears))
            self.history = AmaxHistory(sorted({name for of_rank in everywhere for name in of_rank}), precision)
        for name, linear in linears.items():
            own = operands(precision) if self.history is None else self.history.operands(name, linear)
            _let_emulate(linear, own)
        self.count = len(linears)
        log.info("FP8 is emulated: %d linear layers of this rank round their operands (%s)", self.count, precision.fp8)

    def reset(self) -> None:
        """Start as a new stage does."""
        if self.history is not None:
            self.history.reset()

    def advance(self) -> None:
        """An update was made. Collective."""
        if self.history is not None:
            self.history.advance()


def _linears(
    model: torch.nn.Module, precision: PrecisionConfig, shape: ModelShape
) -> Iterator[tuple[str, torch.nn.Module]]:
    """The linears that Transformer Engine would compute in FP8, by their names in the model."""
    last = shape.num_layers - precision.last_layers_bf16
    decoder: Any = model.decoder
    for local, layer in enumerate(decoder.layers):
        if not precision.first_layers_bf16 < layer.layer_number <= last:
            continue
        for name, module in layer.named_modules(prefix=f"decoder.layers.{local}"):
            if isinstance(module, ColumnParallelLinear | RowParallelLinear | Linear | DuplicatedLinear):
                yield name, module


def _let_emulate(linear: Any, rounding: Operands) -> None:
    """Replace the linear's product; how it talks to other ranks stays its own."""
    if isinstance(linear, Linear | DuplicatedLinear):
        setattr(linear, "forward", lambda x: (emulated_linear(x, linear.weight, rounding), None))  # noqa: B010
    else:
        linear._forward_impl = partial(_parallel_product, rounding=rounding)


def _parallel_product(
    input: Tensor,  # named as Megatron-Core names it
    weight: Tensor,
    bias: Tensor | None,
    *,
    rounding: Operands,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **unused: Any,
) -> Tensor:
    """In the place of Megatron-Core's product of a column- or row-parallel linear. Under sequence parallelism the
    tokens are gathered before they are rounded, so that a scale is the same on every tensor-parallel rank."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = emulated_linear(input, weight, rounding)
    return output if bias is None else output + bias
