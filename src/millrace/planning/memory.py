"""The memory that every role of a run needs on a GPU and on a host, and what does not fit.

A role is one kind of process: the trainer's ranks of a pipeline stage, engines, judges, served teachers. Parameters,
gradients and optimizer state are those of `config.plan`; activations come from `planning.activations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.config.placement import Placement, teacher_count
from millrace.config.plan import ADAM_BYTES, BYTES, MASTER_BYTES, RankPlan, rank_plan
from millrace.config.schema import FleetConfig, MopdStage, Recipe, RlStage, StageConfig, TrainerConfig
from millrace.planning.activations import ActivationSettings, held_bytes, in_flight, peak_bytes, stage_parts
from millrace.planning.assumed import GIB, MEMORY, gib
from millrace.planning.engines import CacheShape, cache_shape, engine_weight_bytes, sequences_that_fit

BUCKETS_PER_RANK = 2
"""A rank fills one bucket of weights while the engines read the other."""
BUCKETS_AT_ONCE = 4
"""So many are on their way to an engine together, where they are broadcast."""

USER_BUFFERS = 12
"""Of Transformer Engine: one for each of a layer's four linears and three passes, all layers in turn."""

Items = dict[str, int]
"""Bytes by what they are."""


OF_TRAINING = frozenset({"activations", "pipeline", "backward", "logits", "fragmentation"})
"""What a trainer's rank holds only while it trains."""


@dataclass(frozen=True, kw_only=True)
class Role:
    name: str
    """`trainer` (with its pipeline stage, where there are several), `engine`, `judge-NAME`, `teacher` or `verifier`."""
    ranks: int
    """Processes of this role that each need so much."""
    device: Items
    """Bytes on the GPU of one rank; on nodes of CPUs part of its host memory."""
    host: Items
    """Bytes in the host's memory of one rank."""
    note: str = ""
    """What else is to be known, such as how many sequences fit."""
    sequences: int | None = None
    """Of an engine: sequences of full length that its cache holds."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Something that does not fit."""

    role: str
    sentence: str
    missing: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    roles: tuple[Role, ...]
    on_cpu: bool
    gpu_bytes: int
    """Memory of one GPU; 0 on nodes of CPUs."""
    host_bytes: int
    """Memory of one node."""
    nodes: tuple[int, ...]
    """Bytes of host memory that each node needs."""
    shortages: tuple[Shortage, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return not self.shortages


class MemoryModel:
    """Memory of one recipe on one cluster. `fused`: whether the layers are Transformer Engine's; when absent they are
    taken to be, on GPUs and where it has such layers."""

    def __init__(self, recipe: Recipe, cluster: ClusterConfig, shape: ModelShape, *, fused: bool | None = None) -> None:
        self.recipe, self.cluster, self.shape = recipe, cluster, shape
        self.on_cpu = recipe.trainer.device == "cpu" or not cluster.node.gpus
        self.engines_on_cpu = not cluster.node.gpus
        self.gpu = int(cluster.node.gpu_memory_gib * GIB) if cluster.node.gpus else 0
        has_such = recipe.model.dtype != "float32" and not _has_local_layers(shape)
        self.fused = not self.on_cpu and has_such if fused is None else fused

    @cached_property
    def trainer(self) -> tuple[Role, ...]:
        """The ranks of each pipeline stage."""
        return tuple(self._trainer(pp_rank) for pp_rank in range(self.recipe.parallel.pp))

    def servers(self) -> Iterator[Role]:
        recipe = self.recipe
        if recipe.samples:
            count = recipe.fleet.engines or len(recipe.fleet.addresses) or 1
            yield self._server("engine", recipe.fleet, self.shape, recipe.model.path, count)
        for name, judge in recipe.judges_used.items():
            if judge.model is not None:
                shape = _shape_or_none(judge.model)
                yield self._server(f"judge-{name}", judge.engine, shape, judge.model, judge.engine.engines)
        served = [s for s in recipe.stages if isinstance(s, MopdStage) and s.placement == "served"]
        if served:
            stage = max(served, key=teacher_count)
            yield self._server("teacher", stage.teacher_engine, self.shape, recipe.model.path, teacher_count(stage))

    @cached_property
    def verifier(self) -> Role | None:
        """Workers of the nodes that verify, each with a program that takes all it may."""
        nodes = self.recipe.placement.verifier_nodes
        if not nodes:
            return None
        largest = max(program_limits(self.recipe).values(), default=0)
        return Role(
            name="verifier",
            ranks=nodes * self.cluster.node.cores,
            device={},
            host={"process": gib("verifier_process_gib"), "program": largest << 20},
            note="a program is counted with all that sandbox.memory_mb lets it take, and hardly any takes it",
        )

    def whole(self, placement: Placement) -> Memory:
        """Memory of all roles and nodes, with what does not fit."""
        verifier = self.verifier
        roles = (*self.trainer, *self.servers(), *([verifier] if verifier else []))
        nodes = tuple(self._node_bytes(placement, roles))
        others = nodes[: placement.nodes - len(placement.verifiers)]
        shortages = [*(s for role in roles for s in self._device_shortage(role)), *self._host_shortages(others)]
        shortages += self._verifier_shortage()
        return Memory(
            roles=roles,
            on_cpu=self.on_cpu,
            gpu_bytes=self.gpu,
            host_bytes=int(self.cluster.node.memory_gib * GIB),
            nodes=nodes,
            shortages=tuple(shortages),
        )

    def _trainer(self, pp_rank: int) -> Role:
        recipe, p = self.recipe, self.recipe.parallel
        of_rank = rank_plan(pp_rank * p.tp * p.cp * p.dp, recipe, self.shape)
        device: Items = {
            "weights": of_rank.weight_bytes,
            **self._fp8_weights(pp_rank, of_rank),
            "gradients": of_rank.gradient_bytes,
            "optimizer": of_rank.optimizer_bytes,
            **self._activations(pp_rank),
        }
        if recipe.precision.parameters:  # master weights in float32 stand for those in FP8
            lent = device["weights"] + of_rank.optimizer_bytes * MASTER_BYTES // (ADAM_BYTES + MASTER_BYTES)
        else:
            lent = of_rank.weight_bytes * of_rank.trained // of_rank.parameters
        extra: list[tuple[Items, Items]] = [
            ({}, {}),
            *(_frozen_models(stage, of_rank, lent) for stage in recipe.stages),
        ]
        device.update(_largest_of([on_device for on_device, _ in extra]))
        host = dict(_largest_of([on_host for _, on_host in extra]))
        if recipe.samples:
            buckets = BUCKETS_PER_RANK * max(recipe.fleet.bucket_bytes, _largest_tensor(self.shape, recipe))
            (device if recipe.fleet.transport in ("nccl", "ipc") else host)["buckets"] = buckets
        if recipe.trainer.offload_optimizer and not self.on_cpu:
            # It is on the GPU during the update alone, when no activation is.
            host["optimizer"] = of_rank.optimizer_bytes
            # Beside engines on the same GPU too, where a sync reads master weights.
            if not (recipe.precision.parameters and recipe.samples and recipe.fleet.transport == "ipc"):
                device["optimizer"] = max(0, of_rank.optimizer_bytes - sum(self._activations(pp_rank).values()))
        host["process"] = gib("cpu_rank_process_gib" if self.on_cpu else "rank_process_gib")
        if not self.on_cpu:
            device["context"] = gib("gpu_context_gib")
            device["fragmentation"] = int(device["activations"] * MEMORY["fragmentation"].value)
            if recipe.trainer.overlap_tensor_parallel:
                tokens = recipe.trainer.max_tokens_per_micro_batch
                device["user_buffers"] = USER_BUFFERS * tokens * self.shape.hidden_size * BYTES[recipe.model.dtype]
        stage = f", pipeline stage {pp_rank}" if p.pp > 1 else ""
        return Role(name=f"trainer{stage}", ranks=p.tp * p.cp * p.dp, device=device, host=host)

    def _fp8_weights(self, pp_rank: int, of_rank: RankPlan) -> Items:
        """The linears' weights in FP8, by rows and by columns: beside those in bfloat16, or with `precision.parameters`
        in their place, and then one at a time is gathered in bfloat16. What activations in FP8 save is not counted."""
        precision, p, shape = self.recipe.precision, self.recipe.parallel, self.shape
        if self.on_cpu or not precision.computes_fp8:
            return {}
        last = shape.num_layers - precision.last_layers_bf16
        layers = [n for n in shape.stage_layers(p.pp, pp_rank) if precision.first_layers_bf16 <= n < last]
        sizes = [shape.layer_parameters(layer) for layer in layers]
        own = sum(size.cut // p.tp + (shape.num_experts // p.ep) * size.expert // p.etp for size in sizes)
        if not precision.parameters:
            return {"fp8_weights": 2 * own}
        width = BYTES[self.recipe.model.dtype]
        largest = max((max(size.cut // p.tp, size.expert // p.etp) for size in sizes), default=0)
        return {
            "weights": of_rank.weight_bytes - width * own,
            "fp8_weights": 2 * own,
            "gathered_weight": width * largest,  # of one linear, for which its layer stands
        }

    def _activations(self, pp_rank: int) -> Items:
        recipe, p, shape = self.recipe, self.recipe.parallel, self.shape
        width = BYTES[recipe.model.dtype]
        settings = ActivationSettings(
            parallel=p,
            dtype=recipe.model.dtype,
            **_recomputation(recipe.trainer),
            tokens=recipe.trainer.max_tokens_per_micro_batch,
            fused=self.fused,
        )
        parts = stage_parts(shape, settings, pp_rank)
        waiting = in_flight(p.pp, pp_rank, 2 * p.pp) - 1
        tokens = settings.tokens / p.cp
        items: Items = {
            "activations": int(waiting * held_bytes(parts) + peak_bytes(parts)),
            # The schedule keeps what a stage sent on until its gradient is there.
            "pipeline": int((waiting + 1) * tokens / (p.tp if p.sequence_parallel else 1) * shape.hidden_size * width)
            * (p.pp > 1),
            # A gradient coming in and one going out are as large as the largest activation of a part.
            "backward": int(2 * max((part.largest for part in parts), default=0)),
        }
        if pp_rank == p.pp - 1:
            rows = shape.padded_vocab_size(p.tp) // p.tp
            chunk = min(recipe.trainer.logprob_chunk_tokens, tokens)
            # A chunk's logits with their gradient in both types, and the gradient of the head's weight.
            items["logits"] = int(chunk * rows * (4 + 4 + width) + rows * shape.hidden_size * (4 + width))
        return items

    def _server(self, kind: str, fleet: FleetConfig, shape: ModelShape | None, path: str, count: int) -> Role:
        tp = fleet.tensor_parallel
        weights = engine_weight_bytes(shape, fleet) if shape is not None else _file_bytes(path) // tp
        on_cpu = self.engines_on_cpu
        note, fitting = "", None
        if on_cpu:
            cache = fleet.kv_cache_bytes
        else:
            cache = max(0, int(self.gpu * fleet.gpu_memory_utilization) - weights - gib("engine_workspace_gib"))
        if shape is not None:
            of_rank = cache_shape(shape, fleet)
            fitting = sequences_that_fit(cache, of_rank, fleet.max_model_len)
            note = _cache_note(of_rank, cache, fleet, fitting)
        elif weights:
            note = "its config.json is of no family that is known here: weights by their files, cache not counted"
        device: Items = {"weights": weights, "cache": cache}
        host: Items = {"process": gib("cpu_engine_process_gib" if on_cpu else "engine_process_gib")}
        if kind == "engine" and fleet.transport in ("nccl", "ipc"):
            device["buckets"] = fleet.bucket_bytes * (BUCKETS_AT_ONCE if fleet.transport == "nccl" else 1)
        if not on_cpu:
            device["workspace"] = gib("engine_workspace_gib")
        return Role(name=kind, ranks=count * tp, device=device, host=host, note=note, sequences=fitting)

    def _node_bytes(self, placement: Placement, roles: Iterable[Role]) -> Iterator[int]:
        by_name = {role.name: role for role in roles}
        trainer = [role for role in roles if role.name.startswith("trainer")]
        per_stage = self.recipe.parallel.world_size // self.recipe.parallel.pp
        totals = [0] * placement.nodes
        for ranks in placement.trainer:
            for rank in range(ranks.first_rank, ranks.first_rank + ranks.ranks):
                role = trainer[rank // per_stage]
                totals[ranks.node] += role.host_bytes + (role.device_bytes if self.on_cpu else 0)
        for server in placement.servers:
            role = by_name[server.kind]
            each = role.host_bytes + (role.device_bytes if self.engines_on_cpu else 0)
            totals[server.node] += each * len(server.gpus)
        for place in placement.verifiers:
            totals[place.node] += by_name["verifier"].host_bytes * place.workers
        yield from totals

    def shortfall_of_cache(self, role: Role) -> int:
        """Bytes that one rank of a server lacks for one sequence of full length; negative when it has them to spare."""
        fleet, shape = _fleet_of(self.recipe, role.name), self._shape_of(role.name)
        spare = role.device["cache"]
        return (cache_shape(shape, fleet).of_sequence(fleet.max_model_len) if shape is not None else 0) - spare

    def _shape_of(self, role: str) -> ModelShape | None:
        if not role.startswith("judge-"):
            return self.shape
        return _shape_or_none(self.recipe.judges[role.removeprefix("judge-")].model or "")

    def _device_shortage(self, role: Role) -> Iterator[Shortage]:
        trainer = role.name.startswith("trainer")
        if role.sequences == 0:
            length = _fleet_of(self.recipe, role.name).max_model_len
            missing = self.shortfall_of_cache(role)
            yield Shortage(
                role=role.name,
                sentence=f"{role.name} has {gib_text(role.device['cache'])} of cache on each rank beside "
                f"{gib_text(role.device['weights'])} of weights, but one sequence of {length} tokens takes "
                f"{gib_text(missing + role.device['cache'])}",
                missing=missing,
            )
        elif self.gpu and not (self.on_cpu and trainer):
            for when, device, limit in self._limits_of(role):
                if (needed := sum(device.values())) > limit:
                    yield Shortage(
                        role=role.name,
                        sentence=f"{role.name} needs {gib_text(needed)} of each GPU{when}, which has "
                        f"{gib_text(limit)} for it ({_largest(device)})",
                        missing=needed - limit,
                    )

    def _limits_of(self, role: Role) -> Iterator[tuple[str, Items, int]]:
        """What a role takes of a GPU, when, and bytes that it may take: with `ipc` engines stand on the trainer's GPUs,
        and leave it theirs while it trains if they sleep then."""
        fleet = self.recipe.fleet
        if fleet.transport != "ipc" or not self.recipe.samples or not role.name.startswith("trainer"):
            yield "", role.device, self.gpu
            return
        beside = int(self.gpu * (1 - fleet.gpu_memory_utilization))
        if fleet.sleep != "never":
            yield " while it trains", role.device, self.gpu - gib("gpu_context_gib")
            kept = {what: size for what, size in role.device.items() if what not in OF_TRAINING}
            yield " beside engines that are awake", kept, beside
        else:
            yield "", role.device, beside

    def _host_shortages(self, nodes: tuple[int, ...]) -> Iterator[Shortage]:
        limit = int(self.cluster.node.memory_gib * GIB)
        short = [node for node, needed in enumerate(nodes) if needed > limit]
        if short:
            worst = max(short, key=lambda node: nodes[node])
            more = f" and {len(short) - 1} more" if len(short) > 1 else ""
            yield Shortage(
                role=f"node {worst}",
                sentence=f"node {worst}{more} needs {gib_text(nodes[worst])} of host memory, but a node of "
                f"{self.cluster.name} has {gib_text(limit)}",
                missing=nodes[worst] - limit,
            )

    def _verifier_shortage(self) -> Iterator[Shortage]:
        limit, workers = int(self.cluster.node.memory_gib * GIB), self.cluster.node.cores
        needed = self.verifier.host_bytes * workers if self.verifier else 0
        if needed > limit:
            yield Shortage(
                role="verifier",
                sentence=f"a node that verifies may need {gib_text(needed)} for {workers} programs at one time, but a "
                f"node of {self.cluster.name} has {gib_text(limit)}",
                missing=needed - limit,
            )


def program_limits(recipe: Recipe) -> dict[str, int]:
    """MiB that programs, and their compilers, may take, by the keys that say so."""
    limits: dict[str, int] = {}
    for name, domain in recipe.domains.items():
        if domain.environment == "code":
            limits[f"domains.{name}.sandbox.memory_mb"] = domain.sandbox.memory_mb
            if "cpp" in domain.sandbox.languages:
                limits[f"domains.{name}.sandbox.compile_memory_mb"] = domain.sandbox.compile_memory_mb
    return limits


def _recomputation(trainer: TrainerConfig) -> dict[str, Any]:
    """Fields of ActivationSettings. What parts other than core attention save is not counted."""
    if trainer.recompute == "selective" and "core_attn" not in trainer.recompute_modules:
        return {"recompute": "none"}
    if trainer.recompute_method == "block":
        return {"recompute": trainer.recompute, "recomputed_layers": trainer.recompute_layers}
    return {"recompute": trainer.recompute, "group": trainer.recompute_layers}


def _fleet_of(recipe: Recipe, role: str) -> FleetConfig:
    if role == "engine":
        return recipe.fleet
    if role == "teacher":
        served = [s for s in recipe.stages if isinstance(s, MopdStage) and s.placement == "served"]
        return max(served, key=teacher_count).teacher_engine
    return recipe.judges[role.removeprefix("judge-")].engine


def _frozen_models(stage: StageConfig, of_rank: RankPlan, lent: int) -> tuple[Items, Items]:
    """What a stage holds besides the policy, on the GPU and on the host of a rank: a reference, teachers. `lent`: bytes
    of one set of weights that takes another's place."""
    if isinstance(stage, RlStage) and stage.kl.coefficient:
        return {"reference": of_rank.weight_bytes}, {}
    if isinstance(stage, MopdStage):
        count = teacher_count(stage)
        if stage.placement == "resident":
            return {"teachers": count * of_rank.weight_bytes}, {}
        # The policy's own weights wait on the host while a teacher stands in its place.
        return {}, {"teachers": (count + 1) * lent} if stage.placement == "time_shared" else {}
    return {}, {}


def _largest_of(choices: Iterable[Items]) -> Items:
    return max(choices, key=lambda items: sum(items.values()))


def _largest_tensor(shape: ModelShape, recipe: Recipe) -> int:
    """Bytes of the largest Hugging Face tensor, which a bucket must hold: an embedding."""
    widest = max(
        shape.vocab_size, shape.ffn_hidden_size, shape.mamba.inner + shape.mamba.convolved if shape.mamba else 0
    )
    return widest * shape.hidden_size * BYTES[recipe.model.dtype]


def _has_local_layers(shape: ModelShape) -> bool:
    return shape.sandwich_norms or any(layer.window is not None for layer in shape.layers)


def _shape_or_none(path: str) -> ModelShape | None:
    try:
        return ModelShape.from_hf(path)
    except ConfigError:
        return None


def _file_bytes(path: str) -> int:
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def _cache_note(cache: CacheShape, room: int, fleet: FleetConfig, fitting: int) -> str:
    wanted = fleet.max_num_seqs * cache.of_sequence(fleet.max_model_len)
    half = sequences_that_fit(room, cache, max(1, fleet.max_model_len // 2))
    return (
        f"max_num_seqs {fleet.max_num_seqs} x max_model_len {fleet.max_model_len} would take {gib_text(wanted)} of "
        f"cache on each rank; {gib_text(room)} hold {fitting} sequences of that length, {half} of half of it"
    )


def _largest(items: Items) -> str:
    """The items that make most of a sum, the largest first."""
    largest = sorted(items.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {gib_text(size)}" for name, size in largest if size)


def gib_text(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"
