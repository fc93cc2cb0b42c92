"""Megatron-Core on CPU ranks: everything that has to be adapted, each piece with its reason.

Megatron-Core is written for CUDA: it names the device by `torch.cuda.current_device()`, writes `device="cuda"`,
compares type names and expects a fused Adam. `adapt` makes the installed version (0.16 to 0.19) run on CPU tensors and
gloo. It is called for a CPU device only, so nothing here is active on CUDA. A patch whose target is missing is an
error, never skipped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from millrace.megatron import state_space

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


def adapt(device: torch.device) -> None:
    """Make Megatron-Core usable on CPU tensors; does nothing for another device or at a second call."""
    global _adapted
    if device.type != "cpu" or _adapted:
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
        _replace(torch.cuda, name, stand_in)


def keep_device_moves_on_cpu() -> None:
    """`.cuda()` on tensors and modules (optimizer state, shared embeddings, loaded shards) stays where it is."""
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)


class _TorchOnCpu(ModuleType):
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
    view = _TorchOnCpu()
    for name in _MODULES_NAMING_CUDA:
        _replace(importlib.import_module(name), "torch", view)


def draw_random_numbers_on_cpu() -> None:
    """The random-state tracker (dropout regions, activation recomputation) reads and writes CUDA generators; here it
    keeps the CPU generator's state. Its warning about draws from the CPU generator is therefore void."""
    from megatron.core.tensor_parallel import random as tracker

    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    _replace(tracker, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(tracker, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))


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

    _replace(torch.Tensor, "type", type_name)


def use_local_multi_tensor_kernels() -> None:
    """Where Transformer Engine or Apex is installed, norms and scaling are bound to their CUDA kernels at import."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    _replace(clip_grads, "multi_tensor_applier", utils.local_multi_tensor_applier)
    _replace(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    _replace(clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    if hasattr(
        clip_grads, "multi_tensor_scale_tensor_impl"
    ):  # since 0.18; None is Megatron-Core's own value without it
        clip_grads.multi_tensor_scale_tensor_impl = None
    _replace(optimizer, "multi_tensor_applier", utils.local_multi_tensor_applier)
    _replace(optimizer, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)


class GroupAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019), the step kept in each
    parameter group and the moments in each parameter's state.

    That is the layout of the fused optimizers of Apex and Transformer Engine, which Megatron-Core's distributed
    optimizer relies on when it saves and loads; torch's own AdamW keeps the step with each parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,  # for CUDA graphs; passed by newer versions
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                group["step"] = int(group.get("step", 0)) + 1
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]
        if not self.adam_w_mode and group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        first, second = self._moments(params)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        if self.adam_w_mode and group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        return [self.state[p]["exp_avg"] for p in params], [self.state[p]["exp_avg_sq"] for p in params]


def use_adam_with_step_in_group() -> None:
    """Without a fused Adam, Megatron-Core falls back to torch's, whose distributed-optimizer checkpoints cannot be
    loaded (KeyError: 'step'): take an Adam with the fused ones' state layout instead."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    _replace(optimizer, "Adam", GroupAdam)
    _replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    _replace(distrib_optimizer, "Adam", GroupAdam)
    _replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    _replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)


def define_router_gemm() -> None:
    """The router asks whether Transformer Engine's GEMM is there by comparing a name with None; 0.16 leaves the name
    undefined when it is not (a NameError at the first router call). Later versions set None themselves."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


def give_split_sizes_as_arrays() -> None:
    """On CUDA the mixture-of-experts dispatcher turns the split sizes of its all-to-all into arrays while it copies
    them to the host; on CPU it would hand gloo tensors, which gloo refuses."""
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, Tensor):
            return tensor.numpy()
        return original(tensor, as_numpy=as_numpy, record_stream=record_stream)

    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", move)


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

    _replace(mappings, "_gather_along_first_dim", gather_parts)
    _replace(mappings, "_reduce_scatter_along_first_dim", reduce_scatter_parts)


def scan_state_spaces_in_torch() -> None:
    """MambaMixer takes its scan and its norm from mamba_ssm, when it is imported. Without mamba_ssm it finds
    `megatron.state_space` under that name, for the time of that import only: nothing else, transformers in particular,
    shall take the stand-ins for the package. Packed sequences, which the mixer ties to versions of the CUDA packages,
    are right in them.

    Its import also takes three inference kernels from a module that needs triton; where triton is missing, these are
    left undefined.
    """
    if importlib.util.find_spec("mamba_ssm") is None:
        stand_ins = _mamba_ssm()
        if importlib.util.find_spec("triton") is None:
            inference = ModuleType("megatron.core.inference.contexts.attention_context.triton.tensor_ops")
            vars(inference).update(tensor_get_slice_after=None, tensor_masked_update=None, tensor_merge=None)
            stand_ins.append(inference)
        sys.modules.update({module.__name__: module for module in stand_ins})
        try:
            mixer = importlib.import_module("megatron.core.ssm.mamba_mixer")
        finally:
            for module in stand_ins:
                del sys.modules[module.__name__]
        _replace(mixer, "_check_mamba_sequence_packing_support", lambda **unused: (True, None))


def _mamba_ssm() -> list[ModuleType]:
    """The modules of mamba_ssm that MambaMixer imports from, over `megatron.state_space`."""
    names = ("", ".ops", ".ops.triton", ".ops.triton.ssd_combined", ".ops.triton.layernorm_gated")
    modules = [ModuleType("mamba_ssm" + name) for name in names]
    for module in modules[:3]:
        module.__path__ = []
    scans = {
        "mamba_chunk_scan_combined": state_space.mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": state_space.mamba_split_conv1d_scan_combined,
    }
    vars(modules[3]).update(scans)
    vars(modules[4]).update(RMSNorm=state_space.RMSNorm)
    return modules


class DuplicatedLinear(torch.nn.Module):
    """A linear without bias that every tensor-parallel rank holds whole: x [..., I] -> [..., O] and no bias.

    Under sequence parallelism each rank sees part of the tokens, and the ranks' gradients are added up.
    """

    def __init__(
        self, inputs: int, outputs: int, *, config: Any, init_method: Callable[[Tensor], Any], **unused: Any
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        init_method(self.weight)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


def project_latents_in_torch() -> None:
    """Experts that work in a latent space have a projection into it and out of it, for which Megatron-Core asks
    Transformer Engine by name."""
    from megatron.core.transformer.moe import moe_layer

    moe_layer.TELinear = DuplicatedLinear
    _replace(moe_layer, "HAVE_TE", True)


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        import megatron.core

        raise AttributeError(
            f"{getattr(owner, '__name__', owner)} has no {name}: megatron-core {megatron.core.__version__} cannot be "
            "adapted to the CPU; install megatron-core>=0.16.1,<0.20"
        )
    setattr(owner, name, value)
