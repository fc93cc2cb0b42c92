"""Experts without a gate on vLLM's CPU engines: down(activation(up(x))), as the Nemotron-H hybrids have them.

vLLM's CPU kernels compute gated experts only, and it refuses the others before it looks for a kernel (vLLM 0.32). Here
is one in plain torch: the (token, expert) pairs are sorted by expert, and each expert that was chosen multiplies one
block of rows. `install` makes it known; it must run before the model is built.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle import unquantized

ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.RELU2_NO_MUL: lambda x: functional.relu(x).square_(),
    MoEActivation.SILU_NO_MUL: functional.silu,
    MoEActivation.GELU_NO_MUL: functional.gelu,
    MoEActivation.GELU_TANH_NO_MUL: lambda x: functional.gelu(x, approximate="tanh"),
}


def apply_experts(
    x_TH: Tensor,
    up_EFH: Tensor,
    down_EHF: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Each token's sum over its K experts, [T, H] float32. T tokens, E experts, H hidden, F expert width."""
    top = experts_TK.shape[1]
    order = torch.argsort(experts_TK.flatten(), stable=True)
    counts = torch.bincount(experts_TK.flatten(), minlength=len(up_EFH)).tolist()
    answers = torch.empty(experts_TK.numel(), down_EHF.shape[1])
    for expert, pairs in enumerate(order.split(counts)):
        if len(pairs):
            inner = activation(functional.linear(x_TH[pairs // top], up_EFH[expert]))
            answers[pairs] = functional.linear(inner, down_EHF[expert]).float()
    return (answers.unflatten(0, experts_TK.shape) * weights_TK[..., None]).sum(1)


class UngatedExperts(CPUUnquantizedExperts):  # type: ignore[misc]
    """vLLM's interface to `apply_experts`. The weights stay as they are loaded, [E, F, H] and [E, H, F]."""

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return not moe_parallel_config.use_ep

    @classmethod
    def _supports_grouped_gemm(cls, moe_config: FusedMoEConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: torch multiplies with the weights as they are."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: object,
        apply_router_weight_on_input: bool,
    ) -> None:
        # A router weight on the input was multiplied in before.
        weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        output.copy_(apply_experts(hidden_states, w1, w2, weights, topk_ids, ACTIVATIONS[activation]))


def install() -> None:
    """Offer UngatedExperts to vLLM's choice of CPU kernels, and let a layer without a gate come that far."""
    kernels, check = unquantized.backend_to_kernel_cls, FusedMoEConfig.__post_init__

    def with_ungated(backend: unquantized.UnquantizedMoeBackend) -> list[type]:
        added = [UngatedExperts] if backend == unquantized.UnquantizedMoeBackend.CPU else []
        return [*kernels(backend), *added]

    def check_all_but_the_gate(config: FusedMoEConfig) -> None:
        try:
            check(config)
        except NotImplementedError as error:  # the last thing that it checks
            if "is_act_and_mul=False" not in str(error):
                raise

    unquantized.backend_to_kernel_cls = with_ungated
    FusedMoEConfig.__post_init__ = check_all_but_the_gate  # type: ignore[method-assign]
