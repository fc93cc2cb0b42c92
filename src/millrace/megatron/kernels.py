"""Which CUDA kernels a trainer computes with: those of Transformer Engine, Apex and mamba-ssm where they load, plain
torch's where not, and what each of these costs. A run says it in its first lines; nothing is exchanged silently.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib import metadata

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import layers as parallel_layers

from millrace.apex import is_unrelated_apex
from millrace.config.model_shape import ModelShape
from millrace.megatron import BROKEN_ENGINE, ENGINE
from millrace.megatron.gaps import scans_in_torch
from millrace.megatron.local_layers import needs_local_layers


def transformer_engine_is_there() -> bool:
    """Whether Transformer Engine imports, as Megatron-Core has tried."""
    return HAVE_TE


def uses_transformer_engine(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the model's layers are Transformer Engine's; on the CPU they never are."""
    return device.type == "cuda" and _why_plain(shape, dtype) is None


def _why_plain(shape: ModelShape, dtype: torch.dtype) -> str | None:
    """Why layers on CUDA are plain torch modules."""
    if not transformer_engine_is_there():
        return _absence_of_engine()
    if needs_local_layers(shape):
        return f"Transformer Engine has no layers like those of {shape.family}"
    if dtype == torch.float32:
        return "Transformer Engine's attention over packed sequences does not compute float32"
    return None


def _absence_of_engine() -> str:
    """Why Transformer Engine is of no use."""
    if BROKEN_ENGINE is not None:
        return f"Transformer Engine is installed, but does not load ({BROKEN_ENGINE})"
    if importlib.util.find_spec(ENGINE) is None:
        return "Transformer Engine is not installed"
    return "Transformer Engine is installed, but lacks what Megatron-Core takes from it"


def accumulates_gradients_in_products() -> bool:
    """Whether products of weight gradients can add to the gradient buffer themselves, through an extension of Apex."""
    return bool(parallel_layers._grad_accum_fusion_available)


def kernels_in_use(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, *, fused_gradients: bool
) -> Iterator[str]:
    """A sentence for each kind of kernel of a model that trains on CUDA; none for the CPU, which has one kind."""
    if device.type != "cuda":
        return
    if (reason := _why_plain(shape, dtype)) is None:
        yield f"layers: Transformer Engine {_version('transformer-engine')}"
    else:
        yield f"layers: plain torch, slower and without FP8: {reason}"
    if shape.mamba is not None:
        if scans_in_torch():
            missing = " and ".join(p for p in ("mamba-ssm", "causal-conv1d") if _version(p) is None)
            yield f"Mamba-2 layers: a scan in plain torch, several times slower than {missing}, which would do it"
        else:
            yield f"Mamba-2 layers: mamba-ssm {_version('mamba-ssm')}"
    yield f"Adam: {_adam()}"
    if fused_gradients and accumulates_gradients_in_products():
        yield "gradients: added to their buffer inside the products (Apex)"
    else:
        yield "gradients: added to their buffer behind the products; Apex's extension would do it inside"


def _adam() -> str:
    from megatron.core import optimizer

    package = optimizer.Adam.__module__.partition(".")[0]
    if package != "millrace":
        return f"fused, of {'Transformer Engine' if package == 'transformer_engine' else 'Apex'}"
    unrelated = "; the installed apex is an unrelated package of that name" if is_unrelated_apex() else ""
    return f"torch's fused kernel; neither Transformer Engine nor NVIDIA's Apex is here{unrelated}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
