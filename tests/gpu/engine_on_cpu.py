"""Transformer Engine's modules on CPU ranks: `engine_on_cpu.py layout --hf FOLDER --tp 2` or `engine_on_cpu.py JOBS`.

All that is Python is theirs and Megatron-Core's: modules and autograd functions, what tensor-parallel ranks exchange,
how tokens are split over experts, attention over packed sequences. What they call of the package's extension for torch,
CUDA kernels alone, is computed by torch here, in float32. FP8 is rounded by the package's own reference, which is
written in torch, for one scale a tensor (`precision.fp8=tensorwise`). A run is one of `verify_worker`, or the jobs of
`measure`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import torch
from torch import Tensor

from millrace.megatron import cpu, model, model_config, verify_worker
from millrace.megatron.local_layers import needs_local_layers
from millrace.megatron.worker import end_with

ENGINE = "transformer_engine"
DTYPES: dict[Any, torch.dtype] = {}
"""torch's data types by the extension's."""


def product(a: Tensor, transposed_a: bool, b: Tensor, transposed_b: bool) -> Tensor:
    """Of matrices by columns, as cuBLAS has them: a row of the result is one of B's."""
    a, b = (t.reshape(-1, t.shape[-1]).float() for t in (a, b))
    return (b.T if transposed_b else b) @ (a.T if transposed_a else a)


def generic_gemm(
    a: Tensor,
    transposed_a: bool,
    b: Tensor,
    transposed_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    gradient: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **more: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """The product, and with `gradient` that of the bias."""
    assert quantizer is None and not gelu and more["comm_overlap"] is None and more["alpha"] == 1.0
    value, of_bias = product(a, transposed_a, b, transposed_b), None
    if bias is not None and gradient:
        of_bias = b.reshape(-1, b.shape[-1]).float().sum(0).to(DTYPES[bias_dtype])
    elif bias is not None:
        value = value + bias.float()
    if out is None:
        shape = value.shape if transposed_b else (*b.shape[:-1], value.shape[-1])
        return value.reshape(shape).to(a.dtype if out_dtype is None else DTYPES[out_dtype]), of_bias, None, None
    write(out, value, accumulate)
    return out, of_bias, None, None


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transposed_a: bool,
    b: Sequence[Tensor],
    transposed_b: bool,
    out: Sequence[Tensor],
    out_dtype: Any,
    rows: Sequence[int],
    bias: Any,
    bias_dtype: Any,
    one_output: bool,
    gelu_in: Any,
    gradient: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    processors: int,
) -> Any:
    outputs = out[0].split(list(rows)) if one_output else out
    for one_a, one_b, one_out in zip(a, b, outputs, strict=True):
        write(one_out, product(one_a, transposed_a, one_b, transposed_b), accumulate)
    return bias


def write(out: Tensor, value: Tensor, accumulate: bool) -> None:
    value = value.reshape(out.shape)
    out.copy_(out + value if accumulate else value)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: Any, margin: int, centered: bool
) -> tuple[Tensor, None, Tensor]:
    """The norm, no mean, and 1 over the root."""
    assert quantizer is None
    inverse = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = (x.float() * inverse[..., None] * (weight.float() + centered)).to(DTYPES.get(dtype, x.dtype))
    if out is not None:
        y = out.copy_(y)
    return y, None, inverse.reshape(-1)


def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor]:
    rows, of_y = (t.reshape(-1, x.shape[-1]).float() for t in (x, gradient))
    normed, scaled = rows * inverse[:, None], of_y * (weight.float() + centered)
    of_x = inverse[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return of_x.to(x.dtype).reshape(x.shape), (of_y * normed).sum(0).to(weight.dtype)


def parts(ends: Tensor) -> list[tuple[int, int]]:
    """First token of each packed sequence, and the one behind its last."""
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))


def convert_thd_to_bshd(packed: Tensor, ends: Tensor, count: int, longest: int) -> Tensor:
    padded = packed.new_zeros(count, longest, *packed.shape[1:])
    for row, (start, end) in enumerate(parts(ends)):
        padded[row, : end - start] = packed[start:end]
    return padded


def convert_bshd_to_thd(padded: Tensor, ends: Tensor, count: int) -> Tensor:
    return torch.cat([padded[row, : end - start] for row, (start, end) in enumerate(parts(ends))])


def rotated(x: Tensor, angles: Tensor, ends: Tensor, direction: int) -> Tensor:
    """Each token of packed sequences [T, heads, D], turned by its place in its own; a pair is D / 2 channels apart."""
    places = torch.cat([torch.arange(end - start) for start, end in parts(ends)])
    angles = angles.reshape(len(angles), -1)[places][:, None]
    turned, rest = x.split([angles.shape[-1], x.shape[-1] - angles.shape[-1]], -1)
    first, second = turned.float().chunk(2, -1)
    across = torch.cat([-second, first], -1)
    return torch.cat([(turned.float() * angles.cos() + direction * across * angles.sin()).to(x.dtype), rest], -1)


def fused_rope_forward(
    x: Tensor, angles: Tensor, starts: Any, layout: Any, interleaved: bool, ends: Tensor, cp: int, cp_rank: int
) -> Tensor:
    assert starts is None and not interleaved and cp == 1
    return rotated(x, angles, ends, 1)


def fused_rope_backward(
    gradient: Tensor, angles: Tensor, starts: Any, layout: Any, interleaved: bool, ends: Tensor, cp: int, cp_rank: int
) -> Tensor:
    return rotated(gradient, angles, ends, -1)


def scaled_masked_softmax_forward(scores: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return (scores.float() * scale).masked_fill(hidden, -1e4).softmax(-1).to(scores.dtype)


def scaled_masked_softmax_backward(gradient: Tensor, shares: Tensor, scale: float) -> Tensor:
    weighted = gradient.float() * shares
    return (scale * (weighted - shares * weighted.sum(-1, keepdim=True))).to(gradient.dtype)


def get_fused_attn_backend(*arguments: Any, **more: Any) -> tuple[Any, str]:
    """None, and why, so that their attention in torch is taken."""
    backends = importlib.import_module(f"{ENGINE}_torch").NVTE_Fused_Attn_Backend
    return backends.NVTE_No_Backend, "this is a CPU"


STAND_INS = (
    *(generic_gemm, te_general_grouped_gemm, rmsnorm_fwd, rmsnorm_bwd, convert_thd_to_bshd, convert_bshd_to_thd),
    *(fused_rope_forward, fused_rope_backward, get_fused_attn_backend),
    *(scaled_masked_softmax_forward, scaled_masked_softmax_backward),
)


def quantized_product(
    quantizer: Any,
    x: Tensor,
    weight: Tensor,
    settings: Any,
    dtype: torch.dtype,
    of_x: Tensor,
    of_weight: Tensor,
    bias: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """The reference's product of numbers in FP8 and their scales, which it takes on tensor cores."""
    value = (x.float() * of_x) @ (weight.float() * of_weight).T
    return (value if bias is None or not bias.numel() else value + bias).to(dtype)


def round_by_reference() -> None:
    reference = importlib.import_module(f"{ENGINE}.pytorch.custom_recipes.reference_current_scaling")
    recipes = importlib.import_module(f"{ENGINE}.common.recipe")
    reference.CurrentScalingQuantizerRef.qgemm = quantized_product
    fp8_utils = importlib.import_module("megatron.core.fp8_utils")
    vars(fp8_utils)["get_fp8_recipe"] = lambda config: recipes.CustomRecipe(
        qfactory=reference.current_scaling_ref_factory
    )
    model_config.require_computable = lambda precision, shape, device: None


def install() -> None:
    """Adapt Megatron-Core to the CPU, and then Transformer Engine, of which models are built from here on."""
    cpu.adapt()
    constants = importlib.import_module(f"{ENGINE}.pytorch.constants")
    DTYPES.update({theirs: ours for ours, theirs in constants.TE_DType.items() if isinstance(ours, torch.dtype)})
    view = cpu.TorchOnCpu()
    for name, module in list(sys.modules.items()):
        if name.startswith(ENGINE):
            for holder in (module, getattr(module, "tex", None)):
                for function in STAND_INS:
                    if hasattr(holder, function.__name__):
                        setattr(holder, function.__name__, function)
            if getattr(module, "torch", None) is torch:
                vars(module)["torch"] = view
    look_like_cuda()
    round_by_reference()
    model.check_recomputation = lambda trainer, device: None
    model_config.uses_transformer_engine = lambda shape, device, dtype: not needs_local_layers(shape)


def look_like_cuda() -> None:
    """What their modules ask of tensors and of the device before they compute."""
    to = Tensor.to

    def stay(self: Tensor, *args: Any, **named: Any) -> Tensor:
        args = tuple(arg for arg in args if not _is_cuda(arg))
        named = {key: value for key, value in named.items() if not _is_cuda(value)}
        return to(self, *args, **named) if args or named else self

    Tensor.to = stay  # type: ignore[method-assign,assignment]
    Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    facts = SimpleNamespace(major=9, minor=0, name="CPU", multi_processor_count=1)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda *device: facts  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "cuda"


def main(arguments: list[str]) -> int:
    install()
    if arguments[0].endswith(".json"):
        measure.main(json.loads(Path(arguments[0]).read_text()))
        return 0
    return verify_worker.main(arguments)


if __name__ == "__main__":
    sys.exit(end_with(lambda: main(sys.argv[1:])))
