"""Adam with the state layout of the fused optimizers of Apex and Transformer Engine, for where neither is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class GroupAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019), the step kept in each
    parameter group and the moments in each parameter's state.

    Megatron-Core's distributed optimizer relies on that layout when it saves and loads; torch's own AdamW keeps the
    step with each parameter. `fused` computes an update in one kernel of torch's, without copies of the moments: the
    default on CUDA. Without it the operations are those that CPU ranks have always made, to the bit.
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
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode
        self.fused = fused

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                group["step"] = int(group.get("step", 0)) + 1
                fused = params[0].is_cuda if self.fused is None else self.fused
                (self._update_fused if fused else self._update)(group, params)
        return loss

    def _update_fused(self, group: dict[str, Any], params: list[Tensor]) -> None:
        first, second = self._moments(params)
        # The kernel counts a step for each parameter, in tensors that it raises by one.
        before = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
        update = adamw if self.adam_w_mode else adam
        update(
            params,
            [p.grad for p in params if p.grad is not None],
            first,
            second,
            [],
            list(before.unbind()),
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

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
