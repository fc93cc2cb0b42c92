"""What parameters that exist in FP8 alone were rounded from: the optimizer's master weights.

With `precision.parameters` the weights of linears are numbers of FP8, which serve to compute and for nothing else. What
they are lies in the distributed optimizer in float32, a part on each data-parallel rank. So whatever reads weights
(exports, weight syncs, checkpoints) gathers those and takes them in the parameter's nominal type, bfloat16, just as if
it had read parameters in that type; and whatever writes weights writes the masters, from which the parameters follow on
the way they follow after an update.

One weight is gathered at a time, so that no second copy of the model comes about. All ranks that share it take part,
also those that do not need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from millrace.megatron.precision import PrecisionError


@dataclass(frozen=True)
class MasterWeight:
    """The master weight of one parameter, wherever its parts are."""

    parameter: Any
    """In its attribute `main_param` Megatron-Core keeps this rank's part."""
    group: dist.ProcessGroup
    """The ranks that share the optimizer's state."""
    pieces: tuple[tuple[int, slice], ...]
    """Which of them holds which of the parameter's numbers, in their order."""

    def own(self) -> tuple[slice, Tensor] | None:
        """This rank's part and where it lies in the whole; None when it has none."""
        mine = dist.get_rank(self.group)
        return next(((part, self.parameter.main_param) for rank, part in self.pieces if rank == mine), None)

    @torch.no_grad()
    def gathered(self) -> Tensor:
        """The whole of it in the parameter's nominal type, on every rank. Collective."""
        whole = torch.empty(self.parameter.shape, dtype=self.parameter.dtype, device=self.parameter.device)
        if (own := self.own()) is not None:
            whole.view(-1)[own[0]].copy_(own[1])
        for rank, part in self.pieces if dist.get_world_size(self.group) > 1 else ():
            dist.broadcast(whole.view(-1)[part], group=self.group, group_src=rank)
        return whole

    @torch.no_grad()
    def take(self, whole: Tensor) -> None:
        """Become what a parameter of the nominal type would hold."""
        if (own := self.own()) is not None:
            own[1].copy_(whole.reshape(-1)[own[0]].to(self.parameter.dtype))


class MasterWeights:
    """Those of one model. Parameters in float32 are their own."""

    def __init__(self, model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
        """Raises PrecisionError where Megatron-Core would not find parameters again that it gathers for MXFP8."""
        self._model, self._optimizer = model, optimizer
        self._through_gradients = model.ddp_config.reuse_grad_buf_for_mxfp8_param_ag
        buffers = (*model.buffers, *model.expert_parallel_buffers)
        self._weights = {p: _spread(p, buffer) for buffer in buffers for p in buffer.params if p.dtype != torch.float32}
        if self._through_gradients and not all(_is_found_again(p, buffer) for buffer in buffers for p in buffer.params):
            raise PrecisionError(
                "precision.parameters is set with mxfp8, but the installed Megatron-Core takes weights from the wrong "
                "place when a parameter has no multiple of 64 numbers, as one of this model has not; update it, or set "
                "precision.parameters=false"
            )

    def of(self, tensor: Tensor) -> MasterWeight | None:
        """That of a parameter in FP8; None for what is no such parameter, and is read and written itself."""
        return self._weights[tensor] if is_float8tensor(tensor) else None

    def parts(self) -> list[Tensor]:
        """This rank's of all master weights, in float32."""
        return [own[1] for weight in self._weights.values() if (own := weight.own()) is not None]

    def take(self, module: torch.nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
        """Become those values of a module, by name, whose parameters are in FP8; the other values."""
        others = dict(values)
        for name, parameter in module.named_parameters():
            if (weight := self.of(parameter)) is not None:
                weight.take(others.pop(name))
        return others

    def follow(self) -> None:
        """Take what the parameters that are not in FP8 hold."""
        for parameter, weight in self._weights.items():
            if not is_float8tensor(parameter):
                weight.take(parameter.detach())

    @torch.no_grad()
    def write(self) -> None:
        """Give all parameters what the masters hold, as an update does. Collective."""
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            if part.is_stub_optimizer:
                continue
            if self._through_gradients:
                part._copy_main_params_to_param_buffer()
            else:
                part._copy_main_params_to_model_params()
        self._model.start_param_sync()

    @torch.no_grad()
    def hand_on(self) -> None:
        """Have the next optimizer of this model begin with these weights rounded to their nominal type, as it begins
        with parameters of that type, rather than with what is in FP8."""
        for parameter, weight in self._weights.items():
            own = weight.own()
            if own is not None and is_float8tensor(parameter):
                # Of the whole only this rank's part is ever read, and memory that is not written to is not taken.
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                whole.view(-1)[own[0]].copy_(own[1])
                _begin_with(parameter, whole)


def require_attributes(module: torch.nn.Module) -> None:
    """What Megatron-Core attaches to a parameter says how its gradient is reduced, so losing it would go unnoticed.
    What a weight was rounded from is attached in the same way. Raises PrecisionError where that is gone."""
    for name, parameter in module.named_parameters():
        if is_float8tensor(parameter) and not hasattr(parameter, "get_high_precision_init_val"):
            raise PrecisionError(
                f"precision.parameters is set, but {name} lost its attributes when the model was put on its device, as "
                "tensors in FP8 do in torch unless Transformer Engine keeps them (2.20 does); update it, or set "
                "precision.parameters=false"
            )


def _spread(parameter: Any, buffer: _ParamAndGradBuffer) -> MasterWeight:
    """Each bucket of a buffer is cut evenly over the ranks, wherever a parameter ends: a weight may lie on one rank, or
    in pieces on several."""
    begin, end, number = buffer.param_index_map[parameter]
    bucket = buffer.buckets[number]
    ranks = buffer.data_parallel_group.size()
    size = bucket.grad_data.numel() // ranks
    pieces = []
    for rank in range(ranks):
        first = max(begin, bucket.offset + rank * size)
        behind = min(end, bucket.offset + (rank + 1) * size)
        if first < behind:
            pieces.append((rank, slice(first - begin, behind - begin)))
    return MasterWeight(parameter, buffer.data_parallel_group, tuple(pieces))


def _is_found_again(parameter: Any, buffer: _ParamAndGradBuffer) -> bool:
    """Whether Megatron-Core takes a parameter from where it was put in a bucket, to which parameters before it are
    filled up (0.16 counts without what fills them up)."""
    begin, end, number = buffer.param_index_map[parameter]
    bucket = buffer.buckets[number]
    return bool(bucket.param_to_index[parameter] == (begin - bucket.offset, end - bucket.offset))


def _begin_with(parameter: Any, whole: Tensor) -> None:
    """Answer as Transformer Engine's parameters do when Megatron-Core asks what they were before they were rounded."""

    def clear() -> None:
        del parameter.get_high_precision_init_val, parameter.clear_high_precision_init_val

    parameter.get_high_precision_init_val = lambda: whole
    parameter.clear_high_precision_init_val = clear
