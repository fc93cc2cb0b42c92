"""FP8 on GPUs: what the recipe's `precision` means to Megatron-Core and to Transformer Engine.

Megatron-Core turns fields of its config into a recipe object of Transformer Engine and computes a layer's linears under
it. `transformer_options`, `data_parallel_options` and `optimizer_options` are those fields; `engine_recipe` is the
object that comes of them, by class and arguments, so that it can be said, and tested, where Transformer Engine is not
installed. Weights stay in the model's type, and Transformer Engine multiplies copies in FP8; with
`precision.parameters` they exist in FP8 alone, and `master_weights` has what they were rounded from. The emulation on
CPU ranks is `fp8_emulation`'s; to Megatron-Core it is no FP8 at all.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from millrace.config import precision_rules
from millrace.config.model_shape import ModelShape
from millrace.config.schema import Fp8Recipe, ParallelConfig, PrecisionConfig
from millrace.errors import MillraceError
from millrace.megatron import BROKEN_ENGINE
from millrace.megatron.local_layers import needs_local_layers

PLAIN = PrecisionConfig()
"""No FP8: everything in the model's own data type."""

OLDEST_ENGINE: dict[Fp8Recipe, tuple[int, int]] = {
    "delayed": (1, 11),
    "tensorwise": (2, 2),
    "blockwise": (2, 3),
    "mxfp8": (2, 1),
}
"""The first release of Transformer Engine with which Megatron-Core builds each recipe, grouped experts included."""


class PrecisionError(MillraceError):
    """FP8 that this machine cannot compute."""


@dataclass(frozen=True)
class EngineRecipe:
    """A recipe object of `transformer_engine.common.recipe`."""

    name: str
    """Its class."""
    arguments: Mapping[str, Any]
    """What Megatron-Core constructs it with; `fp8_format` by the name of its value."""

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.arguments.items())})"


def engine_recipe(precision: PrecisionConfig) -> EngineRecipe | None:
    """What Transformer Engine computes the linear layers by; None without FP8."""
    if not precision.computes_fp8:
        return None
    form = {"fp8_format": precision.chosen_format.upper()}
    if precision.fp8 == "tensorwise":
        return EngineRecipe("Float8CurrentScaling", {**form, "fp8_dpa": False})
    if precision.fp8 == "blockwise":
        return EngineRecipe("Float8BlockScaling", form)
    if precision.fp8 == "mxfp8":
        return EngineRecipe("MXFP8BlockScaling", form)
    history = {"amax_history_len": precision.amax_history, "amax_compute_algo": precision.amax_algorithm}
    whole = {"override_linear_precision": (False, False, False), "fp8_dpa": False, "fp8_mha": False}
    return EngineRecipe("DelayedScaling", {"margin": precision.margin, **form, **history, **whole})


def transformer_options(precision: PrecisionConfig, shape: ModelShape) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig."""
    if not precision.computes_fp8:
        return {}
    options: dict[str, Any] = {
        "fp8": precision.chosen_format,
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.parameters,
    }
    if precision.fp8 == "delayed":
        options |= {
            "fp8_margin": precision.margin,
            "fp8_amax_history_len": precision.amax_history,
            "fp8_amax_compute_algo": precision.amax_algorithm,
        }
    if precision.first_layers_bf16 or precision.last_layers_bf16:
        options |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": precision.first_layers_bf16,
            "num_layers_at_end_in_bf16": precision.last_layers_bf16,
        }
    if shape.num_experts:
        options["moe_router_padding_for_quantization"] = precision.pad_experts
    return options


def data_parallel_options(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron-Core's DistributedDataParallelConfig: weights in FP8 are gathered as they are."""
    return {"fp8_param_gather": True, **_shared_buffer(precision)} if precision.parameters else {}


def optimizer_options(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron-Core's OptimizerConfig: how the optimizer writes master weights into those in FP8."""
    return {"fp8_recipe": precision.fp8, **_shared_buffer(precision)} if precision.parameters else {}


def _shared_buffer(precision: PrecisionConfig) -> dict[str, Any]:
    """MXFP8 rounds a weight twice, by rows and by columns; it is gathered in bfloat16, in the gradients' buffer."""
    return {"reuse_grad_buf_for_mxfp8_param_ag": precision.fp8 == "mxfp8"}


def token_multiple(precision: PrecisionConfig, parallel: ParallelConfig) -> int:
    """The number of tokens that a rank computes must be divisible by this; with sequence parallelism, those of its own
    part."""
    return precision_rules.token_multiple(precision.fp8, parallel) if precision.computes_fp8 else 1


def require_computable(precision: PrecisionConfig, shape: ModelShape, device: torch.device) -> None:
    """Raises PrecisionError where this machine cannot compute, or not emulate, what the recipe asks for."""
    if precision.fp8 == "none":
        return
    if precision.emulate:
        if device.type != "cpu":
            raise PrecisionError(
                "precision.emulate is for CPU ranks, but the trainer runs on CUDA; set precision.emulate=false, or "
                "trainer.device=cpu"
            )
        return
    if device.type == "cpu":
        raise PrecisionError(
            f"precision.fp8 is {precision.fp8}, but the trainer runs on CPU ranks, which have no FP8 products; set "
            "precision.emulate=true to preview the recipe, or precision.fp8=none"
        )
    if needs_local_layers(shape):
        raise PrecisionError(
            f"precision.fp8 is {precision.fp8}, but the layers of {shape.family} are plain torch modules, for "
            "Transformer Engine has none like them; set precision.fp8=none"
        )
    require_recipe(precision.fp8)


def require_recipe(fp8: Fp8Recipe) -> None:
    """Raises PrecisionError where Transformer Engine or this GPU does not compute a recipe."""
    _require_engine(fp8)
    problem = precision_rules.gpu_problem(fp8, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    if problem is not None:
        raise PrecisionError(problem)
    _require_kernels(fp8)


def _require_engine(fp8: Fp8Recipe) -> None:
    oldest = ".".join(map(str, OLDEST_ENGINE[fp8]))
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        raise PrecisionError(
            f"precision.fp8 is {fp8}, which Transformer Engine computes, but it is not installed: pip install "
            f"'transformer-engine[pytorch]>={oldest}' or take NVIDIA's PyTorch container, or set precision.fp8=none, "
            "which needs none"
        ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_ENGINE[fp8]:
        raise PrecisionError(
            f"precision.fp8 is {fp8}, which needs Transformer Engine {oldest}, but {version} is installed; update it, "
            "or set precision.fp8=none"
        )
    if BROKEN_ENGINE is not None:
        raise PrecisionError(
            f"precision.fp8 is {fp8}, which Transformer Engine computes, but the installed {version} does not load "
            f"({BROKEN_ENGINE}); install it anew for torch {torch.__version__}, or set precision.fp8=none"
        )


def _require_kernels(fp8: Fp8Recipe) -> None:
    """Ask Transformer Engine itself: what it computes depends on its release and on CUDA's besides."""
    asked = {"blockwise": "check_fp8_block_scaling_support", "mxfp8": "check_mxfp8_support"}
    new, old = "transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8"
    engine = importlib.import_module(new if importlib.util.find_spec(new) else old)
    able, reason = getattr(engine, asked.get(fp8, "check_fp8_support"))()
    if not able:
        raise PrecisionError(
            f"precision.fp8 is {fp8}, but Transformer Engine {metadata.version('transformer-engine')} with CUDA "
            f"{torch.version.cuda} does not compute it here ({reason}); update them, or set precision.fp8 to another"
        )
