"""The models of `benchmarks.gpu`: layers of released models, as many of them as fit.

What fits is told by the plan's own estimate of memory, which the benchmark then holds against what was taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.released_models import NEMOTRON_3_NANO, QWEN3_30B_A3B, with_layers
from benchmarks.setting import OPTIMIZER, shape_of
from millrace.config.cluster import ClusterConfig, NodeConfig
from millrace.config.model_shape import ModelShape
from millrace.config.schema import ModelConfig, PrecisionConfig, Recipe, SftStage, TrainerConfig
from millrace.planning.assumed import GIB
from millrace.planning.memory import MemoryModel

Family = Literal["dense", "moe", "hybrid"]

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
DENSE = (
    ("Qwen3-8B", 36, 4096, 32, 12288, False),
    ("Qwen3-4B", 36, 2560, 32, 9728, True),
    ("Qwen3-1.7B", 28, 2048, 16, 6144, True),
    ("Qwen3-1.7B, half its layers", 14, 2048, 16, 6144, True),
)
"""Name, layers, hidden size, heads, width of the feed-forward, tied head; the largest first."""
TINY: dict[Family, dict[str, Any]] = {
    "dense": QWEN3
    | {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"head_dim": 32, "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True},
    "moe": QWEN3_30B_A3B
    | {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
    | {"head_dim": 32, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "vocab_size": 512},
    "hybrid": NEMOTRON_3_NANO
    | {"hybrid_override_pattern": "ME*M", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    | {"head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
    | {"chunk_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    | {"moe_shared_expert_intermediate_size": 64, "vocab_size": 512},
}
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
MARGIN = 0.92
"""Of the free memory that an estimate may fill: it may be a few per cent too low."""


@dataclass(frozen=True)
class Choice:
    """A model that fits, and how its activations are kept."""

    name: str
    shape: ModelShape
    recompute: Literal["none", "selective", "full"]
    planned: int
    """Bytes by the plan's estimate."""


def candidates(family: Family, tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and config.json of a family's models, the largest first."""
    if tiny:
        yield f"tiny {family}", TINY[family]
    elif family == "dense":
        for name, layers, hidden, heads, ffn, tied in DENSE:
            sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
            yield name, {**QWEN3, **sizes, "intermediate_size": ffn, "tie_word_embeddings": tied}
    elif family == "moe":
        for layers, experts in (
            (48, 128),
            (24, 128),
            (12, 128),
            (8, 128),
            (6, 128),
            (4, 128),
            (2, 128),
            (4, 32),
            (2, 16),
        ):
            name = f"Qwen3-30B-A3B, {layers} of 48 layers, {experts} of 128 experts"
            yield name, {**with_layers(QWEN3_30B_A3B, layers), "num_experts": experts}
    else:
        for layers, experts in ((52, 128), (26, 128), (13, 128), (8, 128), (6, 128), (6, 64), (6, 32), (6, 16)):
            name = f"Nemotron 3 Nano, {layers} of 52 layers, {experts} of 128 experts"
            yield name, {**with_layers(NEMOTRON_3_NANO, layers), "n_routed_experts": experts}


def choose(
    family: Family, tokens: int, room: int, precision: PrecisionConfig, *, device: str, fused: bool, tiny: bool
) -> Choice | None:
    """The largest model whose training with micro-batches of so many tokens fits into `room` bytes, with as little
    recomputation as that takes; None when none does."""
    for name, config in candidates(family, tiny):
        shape = shape_of(config)
        for recompute in RECOMPUTE:
            trainer = TrainerConfig(device="cpu" if device == "cpu" else "cuda", recompute=recompute)
            trainer = replace(trainer, max_tokens_per_micro_batch=tokens)
            planned = planned_bytes(shape, trainer, precision, room, fused=fused)
            if planned <= MARGIN * room:
                return Choice(name, shape, recompute, planned)
    return None


def planned_bytes(
    shape: ModelShape, trainer: TrainerConfig, precision: PrecisionConfig, room: int, *, fused: bool
) -> int:
    """What `millrace plan` says of one trainer rank: the GPU's memory, on the CPU the whole of its process."""
    recipe = Recipe(
        name="benchmark",
        run_dir="(none)",
        model=ModelConfig(path="(random)", dtype="bfloat16"),
        precision=precision,
        trainer=trainer,
        stages=(SftStage(name="sft", data=("(random)",), steps=1, optimizer=OPTIMIZER),),
    )
    gpus = 0 if trainer.device == "cpu" else 1
    node = NodeConfig(gpus=gpus, gpu_memory_gib=room / GIB, cores=8, memory_gib=room / GIB)
    cluster = ClusterConfig(name="this machine", nodes=1, node=node)
    role = MemoryModel(recipe, cluster, shape, fused=fused).trainer[0]
    return role.device_bytes + (0 if gpus else role.host_bytes)
