"""A stand-in, on CPU ranks, for the tensors in which Transformer Engine keeps weights in FP8 alone.

Only the type of the tensor is a stand-in, and how it is written: numbers of E4M3 with one scale a tensor, which is a
power of two. It answers what Megatron-Core and Millrace ask of Transformer Engine's (`QuantizedTensor`): it has a
nominal type, computes as what it holds, rounds whatever is copied into it, cannot be viewed, and tells once what it
was made of. Distributed optimizer, gradient buffers and checkpoints are Megatron-Core's own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.utils._pytree import tree_map

LARGEST = 448.0


class RoundedTensor(torch.Tensor):
    _data: Tensor
    _scale: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, dtype: torch.dtype) -> RoundedTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)
        made._data, made._scale = data, scale
        return made

    @classmethod
    def of(cls, values: Tensor) -> RoundedTensor:
        empty = torch.empty(values.shape, dtype=torch.uint8)
        made = cls(empty, torch.ones((), dtype=torch.float32), values.dtype)
        made.write(values)
        return made

    def write(self, values: Tensor) -> None:
        self._scale.copy_(scale_for(values.abs().max()))
        self._data.copy_(rounded(values, self._scale))

    def dequantize(self) -> Tensor:
        return (self._data.view(torch.float8_e4m3fn).float() / self._scale).to(self.dtype)

    def detach(self) -> RoundedTensor:
        return type(self)(self._data, self._scale, self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.ops.aten.detach.default:
            return args[0].detach()
        if func == torch.ops.aten.view.default:
            raise NotImplementedError("weights in FP8 have no views")
        if func == torch.ops.aten.copy_.default and isinstance(args[0], RoundedTensor):
            args[0].write(_plain(args[1]))
            return args[0]
        assert func == torch.ops.aten.copy_.default or not func._schema.is_mutable, f"{func} on a weight in FP8"
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


class BlockedTensor(RoundedTensor):
    """Stands for MXFP8, whose bytes do not lie in Megatron-Core's buffers."""


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, RoundedTensor) else value


def scale_for(largest: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(LARGEST / largest.float().clamp(min=1e-12))))


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    return (values.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8)


def use_stand_ins() -> None:
    """Have Megatron-Core take the stand-ins for Transformer Engine's tensors."""
    fp8_utils.HAVE_TE_FP8_TENSOR_CLASS, fp8_utils.FP8_TENSOR_CLASS = True, RoundedTensor
    fp8_utils.HAVE_TE_MXFP8TENSOR, fp8_utils.MXFP8Tensor = True, BlockedTensor
    fp8_utils._modify_underlying_storage_impl = _move
    fp8_utils._quantize_param_shard_impl = _write_shards
    # Gloo sends what is coalesced as one tensor, and so as numbers of one type; NCCL sends bytes and bfloat16 together.
    param_and_grad_buffer._coalescing_manager = lambda *unused, **named: nullcontext()


def _move(tensor: RoundedTensor, data: Tensor) -> None:
    assert not isinstance(tensor, BlockedTensor)
    data.copy_(tensor._data)
    tensor._data = data


def _write_shards(
    tensors: list[RoundedTensor],
    masters: list[Tensor | None],
    offsets: list[int | None],
    group: dist.ProcessGroup,
    shards: Any = None,
) -> None:
    """As `cast_master_weights_to_fp8` does with scales of whole tensors: their largest values are those of all ranks,
    and each rank writes its part."""
    if not tensors:
        return
    values = [None if master is None else master.to(t.dtype) for t, master in zip(tensors, masters, strict=True)]
    largest = torch.stack([torch.zeros(()) if value is None else value.float().abs().max() for value in values])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    for tensor, value, offset, most in zip(tensors, values, offsets, largest, strict=True):
        tensor._scale.copy_(scale_for(most))
        if value is not None and offset is not None:
            tensor._data.view(-1)[offset : offset + value.numel()].copy_(rounded(value, tensor._scale))


def round_linears(model: torch.nn.Module, kind: type[RoundedTensor] = RoundedTensor) -> torch.nn.Module:
    """Let the linears of a model's layers keep their weights as `fp8_model_init` has them kept."""
    for module in model.decoder.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.weight = _parameter(module.weight, kind)
    return model


def _parameter(old: torch.nn.Parameter, kind: type[RoundedTensor]) -> torch.nn.Parameter:
    new: Any = torch.nn.Parameter(kind.of(old.detach()))
    for name, value in vars(old).items():
        setattr(new, name, value)
    new._high_precision_init_val = old.detach().clone()
    new.get_high_precision_init_val = lambda: getattr(new, "_high_precision_init_val", None)
    new.clear_high_precision_init_val = lambda: vars(new).pop("_high_precision_init_val", None)
    return new
