"""How long the phases of a step take: a roofline of computation, memory and network, with the shares in `hardware`.

Training and log-probs are bound by computation and by collectives; decoding by the bytes of weights and cache that each
step reads; a weight sync by the bytes that reach an engine. Nothing overlaps unless it says so, as in the trainer.

Legend: T tokens of a micro-batch, H hidden size, b bytes of the model's data type, k experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from millrace.config.cluster import ClusterConfig
from millrace.config.model_shape import ModelShape
from millrace.config.plan import BYTES, RankPlan, rank_plan
from millrace.config.schema import FleetConfig, MopdStage, Recipe, RlStage, SamplingStage, SftStage, StageConfig
from millrace.planning.engines import cache_shape, engine_weight_bytes, sequences_that_fit
from millrace.planning.flops import Flops, forward_flops
from millrace.planning.hardware import SPEED, Gpu, gpu_of
from millrace.planning.memory import MemoryModel

Seconds = dict[str, float]
Wire = dict[str, float]
"""Bytes by collective."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step of a stage has to do."""

    sequences: int
    prompt: float
    """Mean tokens of a prompt."""
    answer: float
    """Mean tokens of an answer."""
    longest: int
    """Tokens that an answer has at most."""
    updates: int = 1
    scored: int = 0
    """Forward passes over the batch besides training: teachers, a reference, the policy before several updates."""

    @property
    def length(self) -> float:
        return self.prompt + self.answer

    @property
    def tokens(self) -> float:
        return self.sequences * self.length


def work_of(stage: StageConfig, recipe: Recipe) -> Work | None:
    """The work of one step; None for a stage that trains nothing."""
    if isinstance(stage, SftStage):
        mean = min(SPEED["sft_tokens"].value, stage.max_length / 4)
        return Work(sequences=stage.global_batch, prompt=0, answer=mean, longest=stage.max_length)
    if not isinstance(stage, SamplingStage):
        return None
    longest = stage.sampling.max_response_tokens
    updates = stage.updates_per_batch if isinstance(stage, RlStage) else 1
    scored = int(updates > 1)
    if isinstance(stage, RlStage) and stage.kl.coefficient:
        scored += 1
    if isinstance(stage, MopdStage) and stage.placement != "served":
        scored += 1  # each sequence by its own teacher alone
    return Work(
        sequences=stage.prompts_per_step * stage.samples_per_prompt,
        prompt=min(SPEED["prompt_tokens"].value, recipe.fleet.max_model_len / 4),
        answer=SPEED["mean_answer"].value * longest,
        longest=longest,
        updates=updates,
        scored=scored,
    )


class CostModel:
    """Times of one recipe on one cluster."""

    def __init__(
        self, recipe: Recipe, cluster: ClusterConfig, shape: ModelShape, flops: dict[float, Flops] | None = None
    ) -> None:
        """`flops`: those of tokens of sequences by their length, if several models share them."""
        self.recipe, self.cluster, self.shape = recipe, cluster, shape
        self._flops = {} if flops is None else flops
        self.gpu: Gpu = gpu_of(cluster)
        self.memory = MemoryModel(recipe, cluster, shape)
        self.b = BYTES[recipe.model.dtype]

    def flops_of(self, length: float) -> Flops:
        """Operations of a token of a sequence of `length` tokens."""
        if length not in self._flops:
            self._flops[length] = forward_flops(self.shape, length)
        return self._flops[length]

    @cached_property
    def first_rank(self) -> RankPlan:
        return rank_plan(0, self.recipe, self.shape)

    def compute_seconds(self, flops: Flops, passes: float, layer_passes: float, tokens: float) -> float:
        """Seconds of one rank for `tokens` tokens of its replica: `passes` through the whole model and `layer_passes`
        more through its layers."""
        p = self.recipe.parallel
        # The stage with the most layers sets the pace of all.
        largest = max(len(self.shape.stage_layers(p.pp, rank)) for rank in range(p.pp))
        share = p.tp * p.cp * self.shape.num_layers / largest
        kinds = {
            "dense_efficiency": flops.dense,
            "expert_efficiency": flops.experts,
            "attention_efficiency": flops.attention,
            "scan_efficiency": flops.scan,
        }
        layers = sum(count / (self.gpu.flops * SPEED[name].value) for name, count in kinds.items())
        head = flops.head / (self.gpu.flops * SPEED["dense_efficiency"].value)
        return tokens * ((passes + layer_passes) * layers + passes * head) / share

    def replica_tokens(self, work: Work) -> float:
        """Tokens of a step on the data-parallel replica with the most: at least one sequence."""
        return max(work.tokens / self.recipe.parallel.dp, work.length)

    def micro_batches(self, work: Work) -> int:
        """Of one replica and update."""
        p, capacity = self.recipe.parallel, self.recipe.trainer.max_tokens_per_micro_batch
        return max(1, round(work.tokens / work.updates / p.dp / capacity + 0.49))

    def wire(self, work: Work, *, training: bool) -> Wire:
        """Bytes that one rank sends for one update, or for one forward pass over the batch."""
        p, shape, recipe = self.recipe.parallel, self.shape, self.recipe
        tokens = work.tokens / (work.updates if training else 1) / p.dp / p.cp
        layers = shape.num_layers / p.pp
        again = training and recipe.trainer.recompute == "full"
        found: Wire = {}
        parts = sum((layer.mixer is not None) + (layer.ffn is not None) for layer in shape.layers) / p.pp
        if p.tp > 1:
            # A gather and a scatter around each part, the same backward, and the gather again for the weights.
            times = (5 + 2 * again) if training else 2
            found["tensor parallel"] = times * parts * tokens * shape.hidden_size * self.b * (p.tp - 1) / p.tp
        if shape.num_experts and p.ep * p.etp > 1:
            local = tokens / (p.tp if p.sequence_parallel else 1)
            times = (4 + 2 * again) if training else 2
            width = shape.moe_latent_size or shape.hidden_size
            experts = sum(layer.ffn == "experts" for layer in shape.layers) / p.pp
            rows = local * shape.experts_per_token * p.etp
            found["expert all-to-all"] = times * experts * rows * width * self.b * (p.ep * p.etp - 1) / (p.ep * p.etp)
        if p.cp > 1:
            attention = sum(layer.mixer == "attention" for layer in shape.layers) / p.pp
            kept = 2 * max(1, shape.num_kv_heads // p.tp) * shape.head_dim * self.b
            times = 3 if training else 1
            found["context parallel"] = times * attention * tokens * (p.cp - 1) * kept
            if shape.mamba is not None:  # heads for tokens and back, around each mixer
                mixers = layers * sum(layer.mixer == "mamba" for layer in shape.layers) / shape.num_layers
                channels = (2 * shape.mamba.inner + shape.mamba.convolved) / p.tp
                found["context parallel"] += times * mixers * tokens * channels * self.b * (p.cp - 1) / p.cp
        if p.pp > 1:
            found["pipeline"] = (
                (2 if training else 1) * tokens / (p.tp if p.sequence_parallel else 1) * (shape.hidden_size * self.b)
            )
        if training and p.dp * p.cp > 1:
            of_rank = self.first_rank
            ranks = p.dp * p.cp
            each = 4 + self.b if recipe.trainer.distributed_optimizer else 8
            found["data parallel"] = each * of_rank.trained * (ranks - 1) / ranks
        return found

    def wire_seconds(self, wire: Wire) -> float:
        p, node = self.recipe.parallel, self.cluster.node.gpus
        inside = {
            "tensor parallel": p.tp <= node,
            "context parallel": p.tp * p.cp <= node,
            "expert all-to-all": p.ep * p.etp <= node,
            "pipeline": p.world_size <= node,
            "data parallel": p.world_size <= node,
        }
        network, seconds = self.cluster.network, 0.0
        for name, count in wire.items():
            bandwidth = network.intra_node_gb_s if inside[name] else network.inter_node_gb_s
            seconds += count / (bandwidth * 1e9 * SPEED["network_efficiency"].value)
        return seconds

    def train_seconds(self, work: Work) -> Seconds:
        """One step's updates: computation, the pipeline's fill and drain, collectives, and reading and writing the
        optimizer's state."""
        p, recipe = self.recipe.parallel, self.recipe
        flops = self.flops_of(work.length)
        tokens = self.replica_tokens(work)
        passes, layer_passes = 3.0, float(recipe.trainer.recompute == "full")
        if recipe.trainer.recompute == "selective":
            layer_passes = flops.attention / flops.layers
        compute = self.compute_seconds(flops, passes, layer_passes, tokens)
        count = self.micro_batches(work)
        of_rank = self.first_rank
        state = 2 * of_rank.optimizer_bytes + of_rank.gradient_bytes + of_rank.weight_bytes
        return {
            "compute": compute,
            "pipeline bubble": compute * (p.pp - 1) / count,
            "network": work.updates * self.wire_seconds(self.wire(work, training=True)),
            "optimizer": work.updates * state / (self.gpu.memory_bytes_s * SPEED["memory_efficiency"].value),
        }

    def score_seconds(self, work: Work) -> float:
        """Forward passes besides training."""
        p = self.recipe.parallel
        flops = self.flops_of(work.length)
        once = self.compute_seconds(flops, 1.0, 0.0, self.replica_tokens(work))
        once *= 1 + (p.pp - 1) / self.micro_batches(work)
        return work.scored * (once + self.wire_seconds(self.wire(work, training=False)))

    def sync_seconds(self) -> float:
        """Every rank of an engine is shown all weights; buckets of several engines travel at one time."""
        count = self.shape.parameter_count() * self.b
        bandwidth = self.cluster.network.inter_node_gb_s * 1e9 * SPEED["network_efficiency"].value
        return count / bandwidth

    def slots(self, length: float) -> int:
        """Sequences of `length` tokens that one engine decodes at one time."""
        fleet = self.recipe.fleet
        engine = next(role for role in self.memory.servers() if role.name == "engine")
        fitting = sequences_that_fit(engine.device["cache"], cache_shape(self.shape, fleet), int(length))
        return max(1, min(fleet.max_num_seqs, fitting))

    def decoding(self, context: float) -> Decoding:
        """How fast an engine decodes sequences of `context` tokens."""
        return Decoding.of(self.shape, self.recipe.fleet, self.gpu, context)

    def prefill_seconds(self, tokens: float) -> float:
        """Seconds of one engine for prompts of so many tokens."""
        flops = self.flops_of(SPEED["prompt_tokens"].value)
        speed = self.gpu.flops * SPEED["dense_efficiency"].value * self.recipe.fleet.tensor_parallel
        return tokens * flops.layers / speed


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One decoding step of an engine: it reads the weights that are touched and the cache once, multiplies, and starts
    an all-reduce for each part of a layer."""

    weights: float
    """Bytes that every step reads on each rank."""
    experts: float
    """Bytes of all experts of a rank, of which a step reads those that some sequence chose."""
    untouched: float
    """Share of the experts that one sequence does not choose."""
    cache: float
    """Bytes of one sequence."""
    memory_bytes_s: float
    product_s: float
    """Seconds of the products of one sequence."""
    fixed_s: float

    @classmethod
    def of(cls, shape: ModelShape, fleet: FleetConfig, gpu: Gpu, context: float) -> Decoding:
        tp, width = fleet.tensor_parallel, BYTES[fleet.dtype]
        experts = (
            sum(shape.num_experts * shape.layer_parameters(n).expert for n in range(shape.num_layers)) * width / tp
        )
        flops = forward_flops(shape, 2 * context)  # all of the context stands before a new token
        parts = sum((layer.mixer is not None) + (layer.ffn is not None) for layer in shape.layers)
        network = parts * SPEED["collective_us"].value * 1e-6 * (tp > 1)
        return cls(
            weights=engine_weight_bytes(shape, fleet) - experts,
            experts=experts,
            untouched=1 - shape.experts_per_token / shape.num_experts if shape.num_experts else 1.0,
            cache=cache_shape(shape, fleet).of_sequence(int(context)),
            memory_bytes_s=gpu.memory_bytes_s * SPEED["memory_efficiency"].value,
            product_s=flops.total / (tp * gpu.flops * SPEED["dense_efficiency"].value),
            fixed_s=network + SPEED["decode_overhead_ms"].value * 1e-3,
        )

    def seconds(self, running: int) -> float:
        """Of the step that gives each of so many sequences one more token."""
        read = self.weights + self.experts * (1 - self.untouched**running) + running * self.cache
        return max(read / self.memory_bytes_s, running * self.product_s) + self.fixed_s
