"""The scan of Mamba-2 layers by mamba_ssm's kernels, in Triton's interpreter, and by `megatron.state_space`: writes how
far result and gradients are apart, over the largest of each."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.update(TRITON_INTERPRET="1", TRITON_F32_DEFAULT="ieee")
for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
    try:  # these are of no use here, but imported
        importlib.import_module(extension)
    except ImportError:
        sys.modules[extension] = ModuleType(extension)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

from millrace.megatron import state_space  # noqa: E402

LENGTHS = (17, 13, 1, 17)
HEADS, CHANNELS, GROUPS, STATE = 4, 16, 2, 16


def take_first_choice(self: Any, *arguments: Any, **named: Any) -> Any:
    """In the place of measuring which of its forms of a kernel is the fastest."""
    self.configs = self.configs[:1]
    return RUN(self, *arguments, **named)


RUN = Autotuner.run
Autotuner.run = take_first_choice  # type: ignore[method-assign]
torch.cuda.device = lambda *device: contextlib.nullcontext()  # type: ignore[assignment,misc]
torch.cuda.get_device_properties = lambda *device: SimpleNamespace(multi_processor_count=4)  # type: ignore[assignment]


def scanned(scan: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Result and gradients for packed sequences of seeded numbers."""
    generator = torch.Generator().manual_seed(1)
    tokens = sum(LENGTHS)

    def seeded(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": seeded(1, tokens, HEADS, CHANNELS),
        "dt": seeded(1, tokens, HEADS),
        "A": -seeded(HEADS).abs() - 0.1,
        "B": seeded(1, tokens, GROUPS, STATE),
        "C": seeded(1, tokens, GROUPS, STATE),
        "D": seeded(HEADS),
        "dt_bias": seeded(HEADS),
    }
    for tensor in inputs.values():
        tensor.requires_grad_()
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS), dtype=torch.int32), torch.tensor(LENGTHS))[None]
    result = scan(**inputs, chunk_size=16, z=None, dt_softplus=True, seq_idx=sequence, return_final_states=False)
    (result * seeded(*result.shape)).sum().backward()
    return {"result": result.detach()} | {name: tensor.grad for name, tensor in inputs.items()}


def main() -> None:
    kernels = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    theirs, ours = scanned(kernels.mamba_chunk_scan_combined), scanned(state_space.mamba_chunk_scan_combined)
    apart = {name: float((ours[name] - t).abs().max() / t.abs().max()) for name, t in theirs.items()}
    sys.stdout.write(json.dumps(apart) + "\n")


if __name__ == "__main__":
    main()
