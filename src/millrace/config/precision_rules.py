"""What FP8 asks of a recipe and of the GPUs it runs on, one sentence for each thing that is missing.

Which GPU computes which recipe follows Transformer Engine's own tests of compute capabilities. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from millrace.config.cluster import ClusterConfig
from millrace.config.model_shape import ModelShape
from millrace.config.schema import Fp8Recipe, ModelConfig, MopdStage, ParallelConfig, PrecisionConfig, Recipe, RlStage

Capability = tuple[int, int]
"""Compute capability of a GPU: (9, 0) is Hopper's."""

CAPABILITIES: dict[str, Capability] = {
    "v100": (7, 0),
    "t4": (7, 5),
    "a100": (8, 0),
    "a800": (8, 0),
    "a30": (8, 0),
    "a10": (8, 6),
    "a10g": (8, 6),
    "a40": (8, 6),
    "a6000": (8, 6),
    "rtx3090": (8, 6),
    "l4": (8, 9),
    "l40": (8, 9),
    "l40s": (8, 9),
    "rtx4090": (8, 9),
    "rtx6000ada": (8, 9),
    "h100": (9, 0),
    "h200": (9, 0),
    "h800": (9, 0),
    "h20": (9, 0),
    "gh200": (9, 0),
    "b100": (10, 0),
    "b200": (10, 0),
    "gb200": (10, 0),
    "b300": (10, 3),
    "gb300": (10, 3),
    "rtx5090": (12, 0),
    "rtxpro6000": (12, 0),
}
"""By the names that cluster files use."""

GENERATIONS: dict[Capability, str] = {
    (7, 0): "Volta",
    (7, 5): "Turing",
    (8, 0): "Ampere",
    (8, 6): "Ampere",
    (8, 9): "Ada",
    (9, 0): "Hopper",
    (10, 0): "Blackwell",
    (10, 3): "Blackwell Ultra",
    (12, 0): "Blackwell of workstations",
}

PRODUCT_MULTIPLE: dict[Fp8Recipe, int] = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""The sizes of a matrix that a recipe's products take are divisible by this."""
GATHERED_BLOCK = 128
"""Transformer Engine 2.8 to 2.13 gathers nothing else in FP8 by blocks, and later ones gather the rest unrounded."""

EMULATION = "set precision.emulate=true with trainer.device=cpu to preview the recipe"

Problems = Iterator[str]


def precision_problems(recipe: Recipe, shape: ModelShape | None) -> Problems:
    """What is wrong with a recipe's precision wherever it runs; `shape` None: the model could not be read."""
    precision = recipe.precision
    yield from unread_keys(precision)
    if precision.fp8 == "none":
        return
    yield from _dtype(recipe.model, precision)
    if precision.emulate and recipe.trainer.device == "cuda":
        yield (
            "precision.emulate is for CPU ranks, but trainer.device is cuda; set precision.emulate=false, which "
            "computes in FP8 through Transformer Engine, or trainer.device=cpu"
        )
    if not precision.emulate and recipe.trainer.device == "cpu":
        yield (
            f"precision.fp8 is {precision.fp8}, but trainer.device is cpu, which has no FP8 products; {EMULATION}, or "
            "precision.fp8=none"
        )
    if precision.parameters:
        yield from _parameters(recipe, shape)
    if precision.fp8 == "delayed":
        yield from _history(recipe)
    if shape is not None:
        yield from model_problems(precision, shape, recipe.parallel)


def unread_keys(precision: PrecisionConfig) -> Problems:
    """Keys that the recipe of FP8 does not read, so that what they ask for would silently not happen."""
    fresh, fp8 = PrecisionConfig(), precision.fp8
    readers = {
        "format": ("delayed", "tensorwise", "blockwise", "mxfp8"),
        "amax_history": ("delayed",),
        "amax_algorithm": ("delayed",),
        "margin": ("delayed",),
        "power_of_two_scales": ("blockwise",),
        "parameters": ("tensorwise", "blockwise", "mxfp8"),
        "first_layers_bf16": ("tensorwise", "blockwise", "mxfp8"),
        "last_layers_bf16": ("tensorwise", "blockwise", "mxfp8"),
        "pad_experts": ("delayed", "tensorwise", "blockwise", "mxfp8"),
        "emulate": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    }
    for key, recipes in readers.items():
        if getattr(precision, key) != getattr(fresh, key) and fp8 not in recipes:
            yield f"precision.{key} is not read with precision.fp8={fp8}, but by {' and '.join(recipes)}; leave it out"


def model_problems(precision: PrecisionConfig, shape: ModelShape, p: ParallelConfig) -> Problems:
    """What the model and its layout do not allow."""
    most = shape.num_layers // max(p.pp, 1)
    for key in ("first_layers_bf16", "last_layers_bf16"):
        kept = getattr(precision, key)
        if kept > most:
            yield f"precision.{key} is {kept}, but Megatron-Core takes at most the {most} layers of one pipeline stage"
    if precision.pad_experts and not shape.num_experts:
        yield "precision.pad_experts is set, but the model has no experts; leave it out"
    if precision.computes_fp8:
        yield from _widths(precision.fp8, shape, p)


def _widths(fp8: Fp8Recipe, shape: ModelShape, p: ParallelConfig) -> Problems:
    """FP8 products take matrices of whole multiples of 16, or with MXFP8 of its blocks of 32; what ranks gather in FP8
    by blocks of 128 is cut into whole ones."""
    mamba, latents = shape.mamba, shape.moe_latent_size
    if gathers_by_blocks(fp8, p) and shape.hidden_size % GATHERED_BLOCK:
        yield (
            f"precision.fp8 is {fp8} under sequence parallelism, where ranks gather blocks of {GATHERED_BLOCK}, but "
            f"the model's hidden_size is {shape.hidden_size}; use tensorwise, or parallel.tp=1"
        )
    multiple = PRODUCT_MULTIPLE[fp8]
    widths = {
        "hidden_size": (shape.hidden_size, 1, "tp"),
        "feed-forward columns": (shape.ffn_hidden_size if shape.has_dense_ffn else 0, p.tp, "tp"),
        "columns of an expert": (shape.moe_ffn_hidden_size if shape.num_experts else 0, p.etp, "etp"),
        "columns of the shared expert": (shape.shared_ffn_hidden_size or 0, p.tp, "tp"),
        "columns of the experts' latents": (latents, 1, "tp"),
        "channels of a Mamba layer": (mamba.inner if mamba else 0, p.tp, "tp"),
        "columns into a Mamba layer": (mamba.inner + mamba.convolved + mamba.heads if mamba else 0, p.tp, "tp"),
    }
    for what, (width, ranks, key) in widths.items():
        if ranks > 0 and width // ranks % multiple:
            over = f" over parallel.{key}={ranks}" if ranks > 1 else ""
            yield (
                f"precision.fp8 is {fp8}, whose products take multiples of {multiple}, but the model has "
                f"{width} {what}{over}; {f'lower parallel.{key} or ' if ranks > 1 else ''}set precision.fp8=none"
            )


def gathers_by_blocks(fp8: Fp8Recipe, p: ParallelConfig) -> bool:
    """Whether tensor-parallel ranks gather their tokens in FP8, by blocks of GATHERED_BLOCK x GATHERED_BLOCK."""
    return fp8 == "blockwise" and p.sequence_parallel and p.tp > 1


def token_multiple(fp8: Fp8Recipe, p: ParallelConfig) -> int:
    """The number of tokens that a rank computes between its tensor-parallel regions is divisible by this."""
    return GATHERED_BLOCK if gathers_by_blocks(fp8, p) else PRODUCT_MULTIPLE[fp8]


def _dtype(model: ModelConfig, precision: PrecisionConfig) -> Problems:
    if model.dtype != "bfloat16" and not precision.emulate:
        yield (
            f"precision.fp8 is {precision.fp8}, which takes what is not in FP8 as bfloat16, but model.dtype is "
            f"{model.dtype}; set model.dtype=bfloat16"
        )


def _parameters(recipe: Recipe, shape: ModelShape | None) -> Problems:
    """Weights that exist in FP8 alone are read and written through the master weights of the distributed optimizer."""
    trainer = recipe.trainer
    if recipe.precision.emulate:
        yield (
            "precision.parameters saves the memory of GPUs, which precision.emulate does not, and it rounds weights to "
            "FP8 in any case; leave precision.parameters out"
        )
        return
    if not trainer.distributed_optimizer:
        yield (
            "precision.parameters needs the master weights of the distributed optimizer; set "
            "trainer.distributed_optimizer=true"
        )
    if recipe.model.lora is not None:
        yield (
            "precision.parameters and model.lora exclude each other: frozen weights have no masters from which they "
            "could be read; leave one out"
        )
    if trainer.overlap_parameter_gather:
        yield (
            "precision.parameters and trainer.overlap_parameter_gather exclude each other: weights in FP8 are gathered "
            "in the update; set trainer.overlap_parameter_gather=false"
        )
    if recipe.precision.fp8 == "mxfp8" and shape is not None and (shape.num_experts or shape.mamba):
        layers = "experts" if shape.num_experts else "Mamba layers"
        yield (
            "precision.parameters is set with mxfp8, whose weights are gathered in the gradients' buffer, where "
            f"Megatron-Core 0.16 mixes up those of a model with {layers}; use tensorwise or blockwise, or set "
            "precision.parameters=false"
        )


def _history(recipe: Recipe) -> Problems:
    """Frozen models run beside the policy, or on its layers, but have never trained and so have no history."""
    for stage in recipe.stages:
        frozen = None
        if isinstance(stage, RlStage) and stage.kl.coefficient:
            frozen = f"the reference of stages.{stage.name}.kl"
        elif isinstance(stage, MopdStage) and stage.placement != "served":
            frozen = f"the teachers of stages.{stage.name} on the trainer's ranks"
        if frozen is not None:
            yield (
                f"precision.fp8 is delayed, whose scales come from earlier steps of training, but {frozen} never "
                "train; use tensorwise"
            )


def gpu_problem(fp8: Fp8Recipe, capability: Capability, gpu: str) -> str | None:
    """Why a GPU cannot compute a recipe, with the alternative; None when it can."""
    if fp8 == "none":
        return None
    generation = GENERATIONS.get(capability)
    what = f"{gpu} ({f'{generation}, ' if generation else ''}compute capability {'.'.join(map(str, capability))})"
    if capability < (8, 9):
        return f"precision.fp8 is {fp8}, but {what} has no FP8; set precision.fp8=none for bfloat16, or {EMULATION}"
    if fp8 == "blockwise" and capability < (9, 0):
        return (
            f"precision.fp8 is blockwise, which needs compute capability 9.0 (Hopper), but the GPU is {what}; use "
            "tensorwise"
        )
    if fp8 == "mxfp8" and not (10, 0) <= capability < (12, 0):
        other = "blockwise" if capability >= (9, 0) else "tensorwise"
        return (
            f"precision.fp8 is mxfp8, which needs compute capability 10 (Blackwell of data centres), but the GPU is "
            f"{what}; use {other}"
        )
    return None


def cluster_problems_of_engines(recipe: Recipe, cluster: ClusterConfig) -> Problems:
    """Why the GPUs of a cluster cannot compute what engines are quantised to."""
    capability = CAPABILITIES.get(gpu_key(cluster.node.gpu))
    for key, engine in recipe.engines_started.items():
        if engine.quantization == "fp8" and capability is not None and capability < (8, 9):
            yield (
                f"{key}.quantization is fp8, but {cluster.node.gpu} ({GENERATIONS[capability]}, compute capability "
                f"{'.'.join(map(str, capability))}) has no FP8; set {key}.quantization=none"
            )


def gpu_key(name: str | None) -> str:
    """A GPU's name as it is looked up by."""
    return (name or "").lower().replace("-", "").replace("_", "").replace(" ", "")


def cluster_problems_of_precision(recipe: Recipe, cluster: ClusterConfig) -> Problems:
    """Why the nodes of a cluster cannot compute a recipe's precision."""
    precision, node = recipe.precision, cluster.node
    if precision.fp8 == "none":
        return
    if not node.gpus:
        if not precision.emulate:
            yield (
                f"precision.fp8 is {precision.fp8}, but the nodes of {cluster.name} have no GPUs; {EMULATION}, or "
                "precision.fp8=none"
            )
        return
    if precision.emulate:
        if recipe.trainer.device != "cpu":
            yield (
                f"precision.emulate is for CPU ranks, but the nodes of {cluster.name} have GPUs; set "
                "precision.emulate=false, or trainer.device=cpu"
            )
        return
    name = gpu_key(node.gpu)
    if name not in CAPABILITIES:
        yield (
            f"precision.fp8 is {precision.fp8}, but node.gpu of {cluster.name} is {node.gpu!r}, of which it is not "
            f"known whether it computes that; name one of {', '.join(CAPABILITIES)}"
        )
        return
    problem = gpu_problem(precision.fp8, CAPABILITIES[name], f"{cluster.name}'s {node.gpu}")
    if problem is not None:
        yield problem
    elif not precision.power_of_two_scales and CAPABILITIES[name] >= (10, 0):
        yield (
            f"precision.power_of_two_scales is false, but {cluster.name}'s {node.gpu} computes blockwise through its "
            "own scales, which are powers of two; leave it out"
        )
