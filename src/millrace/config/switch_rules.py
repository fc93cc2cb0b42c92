"""Switches of speed and memory that nothing would read, or that the model and the devices have no kernels for."""

from __future__ import annotations

from collections.abc import Iterator

from millrace.config.model_shape import LayerShape, ModelShape
from millrace.config.schema import OUTPUT_DISCARDING, ParallelConfig, Recipe, TrainerConfig

Problems = Iterator[str]


def switch_problems(recipe: Recipe, shape: ModelShape | None) -> Problems:
    trainer, p = recipe.trainer, recipe.parallel
    of_experts = {"token_dispatcher": trainer.token_dispatcher != "alltoall", "permute_fusion": trainer.permute_fusion}
    of_gpus = {
        **of_experts,
        "expandable_segments": trainer.expandable_segments,
        "offload_optimizer": trainer.offload_optimizer,
        "overlap_tensor_parallel": trainer.overlap_tensor_parallel,
    }
    for key in (key for key, asked in of_experts.items() if asked):
        if shape is not None and not shape.num_experts:
            yield f"trainer.{key} is about experts, but the model has none; leave it out"
    for key in (key for key, asked in of_gpus.items() if asked):
        if trainer.device == "cpu":
            yield f"trainer.{key} needs CUDA, but trainer.device is cpu; leave it out"
    if of_experts["token_dispatcher"] and p.ep * p.etp == 1:
        yield (
            "trainer.token_dispatcher is deepep, but with ep and etp of 1 no token leaves its rank; set "
            "trainer.token_dispatcher=alltoall or raise parallel.ep"
        )
    if not trainer.grouped_gemm and shape is not None and not shape.num_experts:
        yield "trainer.grouped_gemm is about experts, but the model has none; leave it out"
    yield from _recomputation(trainer, shape, p)
    yield from _parameter_gather(trainer)
    if trainer.overlap_tensor_parallel:
        yield from _tensor_overlap(recipe, shape)
    if trainer.expandable_segments and recipe.fleet.transport == "ipc":
        yield (
            "trainer.expandable_segments and fleet.transport=ipc exclude each other, for such memory has no handle "
            "that another process could open; leave it out, or use nccl"
        )


def _parameter_gather(trainer: TrainerConfig) -> Problems:
    if not trainer.overlap_parameter_gather:
        return
    needed = {
        "distributed_optimizer": "which leaves parameters to gather",
        "overlap_gradient_reduction": "which cuts them into buckets",
    }
    for key, reason in needed.items():
        if not getattr(trainer, key):
            yield f"trainer.overlap_parameter_gather needs trainer.{key}, {reason}; set trainer.{key}=true"


def _tensor_overlap(recipe: Recipe, shape: ModelShape | None) -> Problems:
    """What user buffers of Transformer Engine do not hold, or would not hold whole."""
    key, p, tokens = "trainer.overlap_tensor_parallel", recipe.parallel, recipe.trainer.max_tokens_per_micro_batch
    if p.tp < 2 or not p.sequence_parallel:
        yield f"{key} needs a parallel.tp of at least 2 and parallel.sequence_parallel; set both, or leave it out"
    if p.tp > 0 and tokens % p.tp:
        yield (
            f"{key} pads every micro-batch to trainer.max_tokens_per_micro_batch, but parallel.tp {p.tp} does not "
            f"divide its {tokens} tokens; set it to {tokens + -tokens % p.tp}"
        )
    if p.cp > 1:
        yield f"{key} pads whole micro-batches, but parallel.cp {p.cp} each of their sequences; set parallel.cp=1"
    if recipe.model.dtype != "bfloat16":
        yield f"{key} needs layers of Transformer Engine, which take model.dtype=bfloat16; set that, or leave it out"
    for other, asked in {"model.lora": recipe.model.lora, "precision.fp8": recipe.precision.fp8 != "none"}.items():
        if asked:
            yield f"{key} and {other} exclude each other: it takes bfloat16 weights that are all trained; leave one out"
    plain = LayerShape(mixer="attention", ffn="dense", window=None)
    if shape is not None and (shape.latent_attention or shape.sandwich_norms or set(shape.layers) != {plain}):
        yield (
            f"{key} is for layers of plain attention and a dense feed-forward, whose norms Transformer Engine fuses "
            f"into the products behind them, but {shape.family} has others; leave it out"
        )


def _recomputation(trainer: TrainerConfig, shape: ModelShape | None, p: ParallelConfig) -> Problems:
    fresh = TrainerConfig()
    readers = {"recompute_modules": "selective", "recompute_method": "full", "recompute_layers": "full"}
    for key, reader in readers.items():
        if getattr(trainer, key) != getattr(fresh, key) and trainer.recompute != reader:
            yield (
                f"trainer.{key} is read with trainer.recompute={reader} alone, but that is {trainer.recompute}; leave "
                "it out"
            )
    if not trainer.recompute_modules:
        yield "trainer.recompute_modules is empty; set trainer.recompute=none to compute nothing again"
    if trainer.recompute_layers < 1:
        yield f"trainer.recompute_layers is {trainer.recompute_layers}; it must be at least 1"
    for module in trainer.recompute_modules:
        if module in OUTPUT_DISCARDING and trainer.device == "cpu":
            yield (
                f"trainer.recompute_modules names {module}, which is computed again through Transformer Engine, but "
                "trainer.device is cpu; leave it out"
            )
    if "moe_act" in trainer.recompute_modules and not trainer.grouped_gemm:
        yield "trainer.recompute_modules names moe_act, which needs trainer.grouped_gemm; leave one of them out"
    if shape is None:
        return
    most = -(-shape.num_layers // max(p.pp, 1))
    if trainer.recompute_layers > most:
        yield f"trainer.recompute_layers is {trainer.recompute_layers}, but a pipeline stage has at most {most} layers"
    needs = {
        "moe_act": ("experts", bool(shape.num_experts)),
        "moe": ("experts", bool(shape.num_experts)),
        "shared_experts": ("shared experts", bool(shape.shared_ffn_hidden_size)),
        "mla_up_proj": ("latent attention", shape.latent_attention is not None),
    }
    for module in trainer.recompute_modules:
        if module in needs and not needs[module][1]:
            yield f"trainer.recompute_modules names {module}, but the model has no {needs[module][0]}; leave it out"
