"""What Megatron-Core lacks where Transformer Engine, Apex or mamba-ssm are not installed, each with its reason.

On CPU ranks all of it is needed, for those packages have CUDA kernels alone (`megatron.cpu`); on CUDA `fill_gaps` adds
what is missing there and says which. `count_padding_of_buckets` mends a fault that no package does. A patch whose
target is missing is an error, never skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from millrace.megatron import state_space
from millrace.megatron.adam import GroupAdam

log = logging.getLogger("millrace")


def fill_gaps() -> None:
    """Make Megatron-Core whole on CUDA with what is installed; where all of its packages are there, only the fault that
    none mends is mended."""
    from megatron.core import optimizer
    from megatron.core.extensions import transformer_engine

    if optimizer.USING_PYTORCH_OPTIMIZER:
        use_adam_with_step_in_group()
    if not transformer_engine.HAVE_TE:
        define_router_gemm()
        project_latents_in_torch()
    scan_state_spaces_in_torch()
    count_padding_of_buckets()


def count_padding_of_buckets() -> None:
    """Before it writes a distributed optimizer's state, Megatron-Core gathers it without the padding behind each bucket
    of parameters, and then cuts it at places that count this padding: of several buckets, all behind the first padding
    would be saved shifted. Here the gathered state has the padding. Later versions (pull request 5077) cut it right."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if "cumulative_padding_stripped" in DistributedOptimizer.sharded_param_state_fully_reshardable.__code__.co_varnames:
        return
    gather = DistributedOptimizer.get_parameter_state_dp_zero

    def gather_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = gather(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers if state is not None else ()):
            for tensors in state[index].values():
                for key in [key for key, value in tensors.items() if isinstance(value, Tensor)]:
                    tensors[key] = _with_padding(tensors[key], buffer.buckets)
        return state

    replace(DistributedOptimizer, "get_parameter_state_dp_zero", gather_with_padding)


def _with_padding(state: Tensor, buckets: Sequence[Any]) -> Tensor:
    """The state of a buffer's parameters, each in its place in the buffer."""
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets]
    if not any(padding):
        return state
    parts = state.split([bucket.numel_unpadded for bucket in buckets])
    return torch.cat([pad(part, (0, count)) for part, count in zip(parts, padding, strict=True)])


def use_adam_with_step_in_group() -> None:
    """Without a fused Adam, Megatron-Core falls back to torch's, whose distributed-optimizer checkpoints cannot be
    loaded (KeyError: 'step'): take an Adam with the fused ones' state layout instead."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    replace(optimizer, "Adam", GroupAdam)
    replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    replace(distrib_optimizer, "Adam", GroupAdam)
    replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)


def define_router_gemm() -> None:
    """The router asks whether Transformer Engine's GEMM is there by comparing a name with None; 0.16 leaves the name
    undefined when it is not (a NameError at the first router call). Later versions set None themselves."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


def scans_in_torch() -> bool:
    """Whether Mamba-2 layers compute in plain torch: their kernels come from two packages, of use together alone."""
    return any(importlib.util.find_spec(package) is None for package in ("mamba_ssm", "causal_conv1d"))


def scan_state_spaces_in_torch() -> None:
    """MambaMixer takes its scan and its norm from mamba_ssm, when it is imported. Without the kernels it finds
    `megatron.state_space` under that name, for the time of that import only: nothing else, transformers in particular,
    shall take the stand-ins for the package. Packed sequences, which the mixer ties to versions of the CUDA packages,
    are right in them.

    Its import also takes three inference kernels from a module that needs triton; where triton is missing, these are
    left undefined.
    """
    if not scans_in_torch():
        return
    stand_ins = _mamba_ssm()
    if importlib.util.find_spec("triton") is None:
        inference = ModuleType("megatron.core.inference.contexts.attention_context.triton.tensor_ops")
        vars(inference).update(tensor_get_slice_after=None, tensor_masked_update=None, tensor_merge=None)
        stand_ins.append(inference)
    before = {module.__name__: sys.modules.get(module.__name__) for module in stand_ins}
    sys.modules.update({module.__name__: module for module in stand_ins})
    try:
        mixer = importlib.import_module("megatron.core.ssm.mamba_mixer")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    replace(mixer, "_check_mamba_sequence_packing_support", lambda **unused: (True, None))


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
    replace(moe_layer, "HAVE_TE", True)


def replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        import megatron.core

        raise AttributeError(
            f"{getattr(owner, '__name__', owner)} has no {name}: megatron-core {megatron.core.__version__} cannot be "
            "adapted; install megatron-core>=0.16.1,<0.20"
        )
    setattr(owner, name, value)
