"""The trainer: its ranks, its optimizer, its memory and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tp: int = 1
    """Tensor-parallel ranks: each weight matrix is cut over them."""
    pp: int = 1
    """Pipeline-parallel stages: the layers are cut over them, as evenly as their number allows."""
    cp: int = 1
    """Context-parallel ranks: each sequence is cut over them."""
    dp: int = 1
    """Data-parallel replicas of the model. World size = tp * pp * cp * dp."""
    ep: int = 1
    """Expert-parallel ranks of a mixture-of-experts model; taken from the ranks of tp * cp * dp."""
    etp: int = 1
    """Tensor-parallel ranks inside one expert."""
    sequence_parallel: bool = False
    """Cut the activations between tensor-parallel regions along the sequence.
    A mixture of experts with tp > 1 needs it."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = 3e-6
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a cosine or linear schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    warmup_from: float = 0.0
    """Learning rate at the first step of the warm-up."""
    decay_steps: int | None = None
    """Length of the schedule in steps; the stage's own steps when absent."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's two decay rates."""
    eps: float = 1e-8
    """Adam's denominator term."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); norms and biases are exempt."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


RecomputedModule = Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]
OUTPUT_DISCARDING: tuple[RecomputedModule, ...] = ("moe_act", "layernorm", "mla_up_proj")
"""Those that Megatron-Core computes again through Transformer Engine alone."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer runs: CUDA with NCCL, or CPU ranks over gloo. `auto` takes CUDA where there is one."""
    max_tokens_per_micro_batch: int = 4096
    """Capacity of one packed micro-batch in tokens, over all its context-parallel ranks; the longest sequence of any
    stage must fit."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: parts of a layer only (selective) or whole layers (full)."""
    recompute_modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """What selective recomputation computes again: core attention (core_attn), a dense feed-forward (mlp), a mixture of
    experts with its router and its all-to-all (moe), its shared experts alone (shared_experts), and through Transformer
    Engine the activation between the two products of the experts (moe_act, with grouped_gemm), the norms before the
    parts of a layer (layernorm), the up projections of latent attention (mla_up_proj). A plan counts what core_attn
    saves, and nothing of the others."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers full recomputation takes: all, in groups of recompute_layers whose input is kept (uniform), or the
    first recompute_layers of each pipeline stage and no other (block)."""
    recompute_layers: int = 1
    """Layers of a group, or of a stage, as recompute_method says."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    offload_optimizer: bool = False
    """Keep the moments and the float32 copies of the weights in host memory but for the update itself: room on the GPU
    for engines that share it, and for activations, at the price of two copies a step."""
    overlap_gradient_reduction: bool = False
    """Reduce each bucket of gradients over data-parallel ranks while the backward pass of the last micro-batch still
    computes the others, rather than all behind it."""
    overlap_parameter_gather: bool = False
    """Gather each bucket of parameters, which the distributed optimizer has updated in parts, while the next forward
    pass computes the one before, rather than all at the end of the update; needs distributed_optimizer and
    overlap_gradient_reduction. It saves time where updates follow each other, as in SFT: a weight sync or a checkpoint
    waits for all of them."""
    overlap_tensor_parallel: bool = False
    """Exchange activations between tensor-parallel ranks while the products on either side compute, through buffers of
    Transformer Engine, which have a fixed size: every micro-batch is padded to max_tokens_per_micro_batch, so that it
    pays where micro-batches are nearly full. For dense models in bfloat16 whose tensor-parallel ranks share one node;
    needs sequence_parallel."""
    token_dispatcher: Literal["alltoall", "deepep"] = "alltoall"
    """How tokens travel to the experts of other ranks: NCCL's all-to-all, or DeepEP's kernels, which send a token once
    to a node however many of its experts stand there; they need the package deep_ep and ep or etp above 1."""
    grouped_gemm: bool = True
    """Compute the experts of a rank in one grouped product, where Transformer Engine has its kernels; otherwise, and
    with false, one expert after the other."""
    permute_fusion: bool = False
    """Sort the tokens of a mixture of experts by Transformer Engine's fused kernels, which save copies and launches."""
    expandable_segments: bool = False
    """Let the CUDA allocator grow its segments, which keeps packed micro-batches of unequal length from fragmenting the
    GPU's memory."""
    deterministic: bool = False
    """Take only kernels that give the same bits each time, at some cost in speed; CPU ranks do in any case."""
    threads_per_rank: int | None = None
    """CPU threads of one trainer rank on CPU; the cores divided by the ranks when absent."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose vocabulary logits exist at one time in the log-prob head."""
    collective_timeout_s: float = 600.0
    """How long a collective of the trainer may wait before the run is stopped."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; the end of each stage is saved in any case. 0: only there."""
    keep: int = 2
    """How many checkpoints stay on disk, the newest first; the end of each stage is kept besides."""
