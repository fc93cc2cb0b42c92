"""Layouts and placements of a recipe on a cluster that fit, the fastest first.

Trainer and engines are searched apart, for each way of dividing the nodes between them: in the synchronous way of
working a step is the one's time behind the other's. Ranked is the mean step of the stages that sample, by their steps;
a recipe without such stages by the time of the whole. Of the kinds of recomputation the first is taken that fits, since
each one costs more time than the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.config.placement import place
from millrace.config.rules import layout_problems
from millrace.config.schema import ParallelConfig, Recipe, SamplingStage, SftStage
from millrace.planning.changes import Overrides, changed, written
from millrace.planning.cost import CostModel, Work, work_of
from millrace.planning.estimate import simulated
from millrace.planning.flops import Flops
from millrace.planning.memory import MemoryModel

PUBLISHED: dict[tuple[str, int, int], tuple[str, Overrides]] = {
    ("nemotron_h", 52, 2688): (
        "NeMo-RL's grpo_nanov3 (TP2 PP2 CP4 EP8 ETP1, engines of TP4)",
        {
            "parallel.tp": 2,
            "parallel.pp": 2,
            "parallel.cp": 4,
            "parallel.ep": 8,
            "parallel.etp": 1,
            "parallel.sequence_parallel": True,
            "fleet.tensor_parallel": 4,
        },
    )
}
"""Layouts that others have published for a model, by its family, layers and hidden size."""


PER_SPLIT = 2
"""Suggestions for one way of dividing the nodes, so that several are seen."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    overrides: Overrides
    hours: float
    """Of all stages whose number of steps is known, without evaluations and checkpoints."""
    rollout_s: float
    train_s: float
    """Scoring included; both are means over the steps of all stages that sample."""
    device_bytes: int
    """The most that a trainer's GPU holds."""

    @property
    def step_s(self) -> float:
        return self.rollout_s + self.train_s

    @property
    def rank(self) -> tuple[float, float]:
        return self.step_s, self.hours

    def __str__(self) -> str:
        return written(self.overrides)


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    tried: int
    """Layouts of the trainer that the rules allow."""
    fitting: int
    best: tuple[Suggestion, ...]
    present: Suggestion | None
    """The recipe as it is, where it fits."""
    published: tuple[str, Suggestion | None] | None
    """The layout that others published for this model, where one is known; None when it does not fit."""


@dataclass(frozen=True)
class _Trainer:
    overrides: Overrides
    seconds: dict[str, float]
    """Of a step of each stage."""
    device_bytes: int


@dataclass(frozen=True)
class _Engines:
    overrides: Overrides
    seconds: dict[str, float]


class _Search:
    def __init__(self, recipe: Recipe, cluster: ClusterConfig, shape: ModelShape) -> None:
        self.recipe, self.cluster, self.shape = recipe, cluster, shape
        self.flops: dict[float, Flops] = {}
        works = ((stage, work_of(stage, recipe)) for stage in recipe.stages)
        self.works: dict[str, Work] = {stage.name: work for stage, work in works if work is not None}
        steps = {stage.name: getattr(stage, "steps", None) for stage in recipe.stages}
        self.steps = {name: steps[name] or 0 for name in self.works}
        self.sampling = [stage.name for stage in recipe.stages if isinstance(stage, SamplingStage)]
        self.need = longest_sequence(recipe)
        self.tried = 0

    def trainers(self, nodes: int) -> Iterator[_Trainer]:
        """The layouts of a trainer of so many nodes that fit."""
        for parallel in layouts(nodes * self.cluster.node.gpus, self.shape, self.cluster.node.gpus):
            self.tried += 1
            for tokens in (self.need, 2 * self.need):
                found = self._first_that_fits(parallel, tokens, nodes)
                if found is not None:
                    yield found

    def _first_that_fits(self, parallel: ParallelConfig, tokens: int, nodes: int) -> _Trainer | None:
        trainer = replace(self.recipe.trainer, max_tokens_per_micro_batch=tokens, distributed_optimizer=True)
        for recompute in ("none", "selective", "full"):
            recipe = replace(
                self.recipe,
                parallel=parallel,
                trainer=replace(trainer, recompute=recompute),  # type: ignore[arg-type]
                fleet=replace(self.recipe.fleet, transport="nccl"),
            )
            needed = max(role.device_bytes for role in MemoryModel(recipe, self.cluster, self.shape).trainer)
            if needed <= self.cluster.node.gpu_memory_gib * 2**30:
                overrides = parallel_overrides(parallel) | {
                    "trainer.recompute": recompute,
                    "trainer.distributed_optimizer": True,
                    "trainer.max_tokens_per_micro_batch": tokens,
                    "placement.trainer_nodes": nodes,
                }
                return _Trainer(overrides, self.train_seconds(recipe), needed)
        return None

    def train_seconds(self, recipe: Recipe) -> dict[str, float]:
        model = CostModel(recipe, self.cluster, self.shape, self.flops)
        return {
            name: sum(model.train_seconds(work).values()) + model.score_seconds(work)
            for name, work in self.works.items()
        }

    def engines(self, nodes: int) -> Iterator[_Engines]:
        """Fleets on so many nodes, whose cache holds at least one sequence."""
        gpus = self.cluster.node.gpus
        for tp in (n for n in (1, 2, 4, 8, 16) if n <= gpus and self.shape.num_heads % n == 0):
            overrides: Overrides = {"fleet.engines": nodes * gpus // tp, "fleet.tensor_parallel": tp}
            fleet = replace(
                self.recipe.fleet, engines=nodes * gpus // tp, addresses=(), tensor_parallel=tp, transport="nccl"
            )
            recipe = replace(self.recipe, fleet=fleet)
            roles = {role.name: role for role in MemoryModel(recipe, self.cluster, self.shape).servers()}
            engine = roles["engine"]
            if engine.sequences and engine.device_bytes <= self.cluster.node.gpu_memory_gib * 2**30:
                overrides |= {"fleet.addresses": "[]", "fleet.transport": "nccl"}
                yield _Engines(overrides, self.rollout_seconds(recipe))

    def rollout_seconds(self, recipe: Recipe) -> dict[str, float]:
        model = CostModel(recipe, self.cluster, self.shape, self.flops)
        done: dict[Work, float] = {}
        for name in self.sampling:
            work = self.works[name]
            if work not in done:
                outcome = simulated(model, work, 0.0, "synchronous", 0, steps=1)
                done[work] = outcome.rollout_s + model.sync_seconds()
        return {name: done[self.works[name]] for name in self.sampling}

    def together(self, trainer: _Trainer, engines: _Engines | None) -> Suggestion:
        rollout = engines.seconds if engines else {}
        seconds = sum(n * (trainer.seconds[name] + rollout.get(name, 0.0)) for name, n in self.steps.items())
        count = max(1, sum(self.steps[name] for name in self.sampling))
        return Suggestion(
            overrides={**trainer.overrides, **(engines.overrides if engines else {})},
            hours=seconds / 3600,
            rollout_s=sum(self.steps[name] * rollout.get(name, 0.0) for name in self.sampling) / count,
            train_s=sum(self.steps[name] * trainer.seconds[name] for name in self.sampling) / count,
            device_bytes=trainer.device_bytes,
        )


def suggest(recipe: Recipe, cluster: ClusterConfig, shape: ModelShape, most: int = 5) -> Suggestions:
    """Search. Raises ConfigError for nodes of CPUs and GPUs whose speed is not known."""
    CostModel(recipe, cluster, shape)
    search = _Search(recipe, cluster, shape)
    found: list[Suggestion] = []
    fitting = 0
    free = cluster.nodes - other_nodes(recipe, cluster)
    for nodes in trainer_nodes(free, samples=recipe.samples):
        trainers = sorted(search.trainers(nodes), key=lambda one: search.together(one, None).rank)
        fitting += len(trainers)
        # Trainer and fleet add up, so that the best of each are the best together.
        fleets: list[_Engines | None] = [*search.engines(free - nodes)] if recipe.samples else [None]
        pairs = [search.together(trainer, fleet) for trainer in trainers[:PER_SPLIT] for fleet in fleets]
        found += sorted(pairs, key=lambda one: one.rank)[:PER_SPLIT]
    ranked = sorted(found, key=lambda one: one.rank)
    best = [one for one in ranked if _stands(recipe, cluster, one.overrides)][:most]
    return Suggestions(
        tried=search.tried,
        fitting=fitting,
        best=tuple(best),
        present=_evaluated(search, {}),
        published=_published(search),
    )


def _published(search: _Search) -> tuple[str, Suggestion | None] | None:
    shape, recipe, cluster = search.shape, search.recipe, search.cluster
    found = PUBLISHED.get((shape.family, shape.num_layers, shape.hidden_size))
    if found is None:
        return None
    name, overrides = found
    best: Suggestion | None = None
    free = cluster.nodes - other_nodes(recipe, cluster)
    for nodes in trainer_nodes(free, samples=recipe.samples):
        p = changed(recipe, overrides).parallel
        dp, rest = divmod(nodes * cluster.node.gpus, p.tp * p.pp * p.cp)
        engines = (free - nodes) * cluster.node.gpus // int(overrides["fleet.tensor_parallel"])
        if rest or not dp or dp * p.tp * p.cp % (p.ep * p.etp):
            continue
        one = _evaluated(
            search,
            {
                **overrides,
                "parallel.dp": dp,
                "placement.trainer_nodes": nodes,
                "fleet.engines": engines,
                "fleet.addresses": (),
                "fleet.transport": "nccl",
            },
        )
        if one is not None and (best is None or one.rank < best.rank):
            best = one
    return name, best


def _evaluated(search: _Search, overrides: Overrides) -> Suggestion | None:
    """The recipe with these values, if it fits."""
    recipe = changed(search.recipe, overrides)
    if list(layout_problems(recipe.parallel, search.shape)):
        return None
    model = MemoryModel(recipe, search.cluster, search.shape)
    needed = max(role.device_bytes for role in model.trainer)
    if needed > search.cluster.node.gpu_memory_gib * 2**30:
        return None
    shown = {key: "[]" if value == () else value for key, value in overrides.items()}
    trainer = _Trainer(shown, search.train_seconds(recipe), needed)
    return search.together(trainer, _Engines({}, search.rollout_seconds(recipe)) if recipe.samples else None)


def _stands(recipe: Recipe, cluster: ClusterConfig, overrides: Overrides) -> bool:
    """Whether the nodes have places for it."""
    values: dict[str, Any] = {key: () if value == "[]" else value for key, value in overrides.items()}
    try:
        place(changed(recipe, values), cluster)
    except ConfigError:
        return False
    return True


def layouts(world: int, shape: ModelShape, gpus: int) -> Iterator[ParallelConfig]:
    """The layouts of `world` ranks that a model allows. Tensor parallelism stays inside a node."""
    for tp in (n for n in (1, 2, 4, 8) if n <= gpus):
        for pp in (n for n in range(1, 17) if shape.num_layers % n == 0 or n & (n - 1) == 0):
            for cp in (1, 2, 4, 8):
                dp, rest = divmod(world, tp * pp * cp)
                if rest or not dp or not _mamba_allows(shape, tp * cp):
                    continue
                for ep in _powers(shape.num_experts or 1):
                    for etp in {1, tp} if shape.num_experts else {1}:
                        if tp * cp * dp % (ep * etp):
                            continue
                        p = ParallelConfig(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, etp=etp, sequence_parallel=tp > 1)
                        if next(iter(layout_problems(p, shape)), None) is None:
                            yield p


def _mamba_allows(shape: ModelShape, ranks: int) -> bool:
    """The heads and groups of Mamba layers are shared by tensor- and context-parallel ranks."""
    return shape.mamba is None or not (shape.mamba.heads % ranks or shape.mamba.groups % ranks)


def _powers(most: int) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]


def trainer_nodes(nodes: int, *, samples: bool) -> list[int]:
    """How many of the nodes may train: all, or of a run with a fleet an eighth to three quarters."""
    if not samples:
        return [nodes]
    shares = {max(1, nodes * share // 8) for share in (1, 2, 4, 6)}
    return sorted(n for n in shares if n < nodes) or [nodes]


def other_nodes(recipe: Recipe, cluster: ClusterConfig) -> int:
    """Nodes that judges of the run's own want, and those that verify."""
    ranks = sum(
        judge.engine.engines * judge.engine.tensor_parallel for judge in recipe.judges_used.values() if judge.model
    )
    return -(-ranks // cluster.node.gpus) + recipe.placement.verifier_nodes


def longest_sequence(recipe: Recipe) -> int:
    """Tokens of the longest sequence that a micro-batch must hold."""
    lengths = [stage.max_length for stage in recipe.stages if isinstance(stage, SftStage)]
    return max([*lengths, *([recipe.fleet.max_model_len] if recipe.samples else [])], default=4096)


def parallel_overrides(p: ParallelConfig) -> Overrides:
    return {f"parallel.{key}": getattr(p, key) for key in ("tp", "pp", "cp", "dp", "ep", "etp", "sequence_parallel")}


def render_text(found: Suggestions) -> str:
    lines = [f"{found.tried} layouts of the trainer tried, {found.fitting} with their micro-batches fit; the fastest:"]
    for number, one in enumerate(found.best, 1):
        lines += [f"{number}. {_told(one)}", f"   {one}"]
    if not found.best:
        lines.append("none fits; take more nodes, or shorter sequences")
    present = _told(found.present) if found.present else "does not fit"
    lines.append(f"the recipe as it is: {present}")
    if found.published is not None:
        name, layout = found.published
        if layout is None:
            lines.append(f"{name}: does not fit")
        else:
            against = f", {layout.step_s / found.best[0].step_s:.2f} times the fastest step" if found.best else ""
            lines += [f"{name}: fits, {_told(layout)}{against}", f"   {layout}"]
    return "\n".join(lines)


def _told(one: Suggestion) -> str:
    return (
        f"a step {one.step_s:.0f} s, {one.rollout_s:.0f} of them rollout and {one.train_s:.0f} training; all stages "
        f"{one.hours:.0f} h; {one.device_bytes / 2**30:.0f} GiB of a trainer's GPU"
    )
