"""Megatron-Core on CPU ranks: everything that has to be adapted, each piece with its reason.

Megatron-Core is written for CUDA: it names the device by `torch.cuda.current_device()`, writes `device="cuda"`,
compares type names and expects a fused Adam. `adapt` makes the installed version (0.16 to 0.19) run on CPU tensors and
gloo. It is called for CPU ranks only, so nothing here is active on CUDA; what is missing there as well, without the
packages of CUDA kernels, stands in `megatron.gaps`. A patch whose target is missing is an error, never skipped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from millrace.megatron.gaps import (
    count_padding_of_buckets,
    define_router_gemm,
    project_latents_in_torch,
    replace,
    scan_state_spaces_in_torch,
    use_adam_with_step_in_group,
)

CPU = torch.device("cpu")

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like")
"""torch functions to which Megatron-Core passes a literal device="cuda"."""

_MODULES_NAMING_CUDA = (
    "megatron.core.utils",  # plain stand-ins for the fused norm and scaling kernels
    "megatron.core.pipeline_parallel.schedules",  # counter of the tokens of a step
    "megatron.core.optimizer.clip_grads",  # norms that are reduced over ranks
    "megatron.core.optimizer.optimizer",  # flag of found infinities and the loss scale
    "megatron.core.dist_checkpointing.exchange_utils",  # buffers of loaded shards
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",  # flags that ranks agree on
)

_adapted = False


def adapt() -> None:
    """Make Megatron-Core usable on CPU tensors; does nothing at a second call."""
    global _adapted
    if _adapted:
        return
    leave_torch_compile_out()
    answer_cuda_calls_on_cpu()
    keep_device_moves_on_cpu()
    map_literal_devices()
    draw_random_numbers_on_cpu()
    answer_to_cuda_type_names()
    use_local_multi_tensor_kernels()
    use_adam_with_step_in_group()
    define_router_gemm()
    give_split_sizes_as_arrays()
    gather_unequal_parts()
    scan_state_spaces_in_torch()
    project_latents_in_torch()
    count_padding_of_buckets()
    _adapted = True


def leave_torch_compile_out() -> None:
    """Megatron-Core decorates its small fused helpers with torch.compile; on CPU compiling them takes longer (20 s at
    the first mixture-of-experts step) than they ever save."""
    torch.compiler.set_stance("force_eager")


class _Immediate:
    """Stands for a CUDA stream or event: on CPU an operation is over when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Immediate:
        return self

    def query(self) -> bool:
        return True

    def _nothing(self, *args: Any) -> None:
        pass

    wait = wait_stream = wait_event = record = synchronize = _nothing


def answer_cuda_calls_on_cpu() -> None:
    """`torch.cuda.current_device()` is Megatron-Core's way to say "here", and streams, events and synchronisation
    stand in its pipeline schedules and dispatchers: all of them answer for the CPU."""
    here = _Immediate()
    stand_ins: dict[str, Any] = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
        "Stream": _Immediate,
        "Event": _Immediate,
        "current_stream": lambda *args, **kwargs: here,
        "default_stream": lambda *args, **kwargs: here,
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, stand_in in stand_ins.items():
        replace(torch.cuda, name, stand_in)


def keep_device_moves_on_cpu() -> None:
    """`.cuda()` on tensors and modules (optimizer state, shared embeddings, loaded shards) stays where it is."""
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)


class TorchOnCpu(ModuleType):
    """The module torch, seen by one Megatron-Core module: its tensor factories take "cuda" for the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is not None and torch.device(device).type == "cuda":
            device = CPU
        return factory(*args, device=device, **kwargs)

    return make


def map_literal_devices() -> None:
    """A few Megatron-Core modules write `device="cuda"`; only these see tensor factories that map it, torch itself is
    left as it is."""
    view = TorchOnCpu()
    for name in _MODULES_NAMING_CUDA:
        replace(importlib.import_module(name), "torch", view)


def draw_random_numbers_on_cpu() -> None:
    """The random-state tracker (dropout regions, activation recomputation) reads and writes CUDA generators; here it
    keeps the CPU generator's state. Its warning about draws from the CPU generator is therefore void."""
    from megatron.core.tensor_parallel import random as tracker

    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    replace(tracker, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    replace(tracker, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))


class _TypeName(str):
    """A tensor's type name that also equals its CUDA spelling: torch.FloatTensor and torch.cuda.FloatTensor."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) == str(other).replace("torch.cuda.", "torch.")

    def __ne__(self, other: object) -> bool:
        return not self == other


def answer_to_cuda_type_names() -> None:
    """Optimizers and gradient clipping compare `Tensor.type()` with 'torch.cuda.FloatTensor' and refuse anything
    else."""
    original = torch.Tensor.type

    def type_name(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        return _TypeName(original(self)) if dtype is None else original(self, dtype, *args, **kwargs)

    replace(torch.Tensor, "type", type_name)


def use_local_multi_tensor_kernels() -> None:
    """Where Transformer Engine or Apex is installed, norms and scaling are bound to their CUDA kernels at import."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    replace(clip_grads, "multi_tensor_applier", utils.local_multi_tensor_applier)
    replace(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    replace(clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    if hasattr(
        clip_grads, "multi_tensor_scale_tensor_impl"
    ):  # since 0.18; None is Megatron-Core's own value without it
        clip_grads.multi_tensor_scale_tensor_impl = None
    replace(optimizer, "multi_tensor_applier", utils.local_multi_tensor_applier)
    replace(optimizer, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)


def give_split_sizes_as_arrays() -> None:
    """On CUDA the mixture-of-experts dispatcher turns the split sizes of its all-to-all into arrays while it copies
    them to the host; on CPU it would hand gloo tensors, which gloo refuses."""
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, Tensor):
            return tensor.numpy()
        return original(tensor, as_numpy=as_numpy, record_stream=record_stream)

    replace(token_dispatcher, "maybe_move_tensor_to_cpu", move)


def gather_unequal_parts() -> None:
    """Ranks that share experts by tensor parallelism gather their tokens, and scatter the sums, in parts as large as
    the router made them; gloo's gather and reduce-scatter take equal parts only, so that parts travel padded."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(part: Tensor, group: Any, sizes: Sequence[int] | None = None, *more: Any, **named: Any) -> Tensor:
        """part [n_rank, ...], sizes: n of each rank -> all parts [sum(sizes), ...]."""
        if sizes is None or len(set(sizes)) == 1:
            return gather(part, group, sizes, *more, **named)
        longest = max(sizes)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        whole = part.new_empty(longest * len(sizes), *part.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, padded, group=group)
        return torch.cat([rows[:size] for rows, size in zip(whole.split(longest), sizes, strict=True)])

    def reduce_scatter_parts(
        whole: Tensor, group: Any, sizes: Sequence[int] | None = None, *more: Any, **named: Any
    ) -> Tensor:
        """whole [sum(sizes), ...], sizes: n of each rank -> this rank's part [n_rank, ...] of the sum over ranks."""
        if sizes is None or len(set(sizes)) == 1:
            return reduce_scatter(whole, group, sizes, *more, **named)
        longest = max(sizes)
        padded = whole.new_zeros(longest * len(sizes), *whole.shape[1:])
        for rows, part in zip(padded.split(longest), whole.split(list(sizes)), strict=True):
            rows[: len(part)] = part
        mine = whole.new_empty(longest, *whole.shape[1:])
        torch.distributed.reduce_scatter_tensor(mine, padded, group=group)
        return mine[: sizes[group.rank()]]

    replace(mappings, "_gather_along_first_dim", gather_parts)
    replace(mappings, "_reduce_scatter_along_first_dim", reduce_scatter_parts)
