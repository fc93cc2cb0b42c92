"""The state of an optimizer in host memory, but for the updates.

What is moved are the moments and the float32 copies of the weights, which are three quarters of what training a model
in bfloat16 keeps. The tensors stay where they are known; only their memory on the device is given back, so that
whatever refers to them finds them again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class HostState:
    """Where the state of one optimizer waits. `keep`: tensors of the model, whose memory is left alone; those in FP8
    have none of their own type, which the optimizer could share."""

    def __init__(self, optimizer: MegatronOptimizer, keep: Iterator[Tensor]) -> None:
        self._optimizer = optimizer
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in keep if not is_float8tensor(tensor)}
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._buffers: dict[int, Tensor] = {}

    @contextmanager
    def present(self) -> Iterator[None]:
        """Have the state on the device for a while. Not to be nested."""
        self.bring_back()
        try:
            yield
        finally:
            self.take_out()

    @torch.no_grad()
    def take_out(self) -> None:
        """Copy the state to the host, into page-locked memory that is kept, and free its memory on the device."""
        leaving = [(tensor, self._host(tensor)) for tensor in self._tensors()]
        for tensor, host in leaving:
            host.copy_(tensor, non_blocking=True)
        _finish(leaving)
        for tensor, _ in leaving:
            tensor.untyped_storage().resize_(0)
        if any(tensor.is_cuda for tensor, _ in leaving):
            torch.cuda.empty_cache()  # for the engines that share the GPU
        self._waiting += leaving

    @torch.no_grad()
    def bring_back(self) -> None:
        for tensor, host in self._waiting:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            tensor.copy_(host, non_blocking=True)
        _finish(self._waiting)
        self._waiting = []

    @property
    def waiting_bytes(self) -> int:
        return sum(host.numel() * host.element_size() for _, host in self._waiting)

    def _host(self, tensor: Tensor) -> Tensor:
        host = self._buffers.get(id(tensor))
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:  # a loaded state has other tensors
            host = self._buffers[id(tensor)] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host

    def _tensors(self) -> Iterator[Tensor]:
        """Each has memory of its own, the whole of it."""
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = part.optimizer
            masters = [p for group in inner.param_groups for p in group["params"]]
            moments = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
            for tensor in (*masters, *moments):
                storage = tensor.untyped_storage()
                whole = storage.nbytes() == tensor.numel() * tensor.element_size() > 0
                if whole and storage.data_ptr() not in self._kept:
                    yield tensor


def _finish(copies: list[tuple[Tensor, Tensor]]) -> None:
    if any(tensor.is_cuda for tensor, _ in copies):
        torch.cuda.synchronize()
