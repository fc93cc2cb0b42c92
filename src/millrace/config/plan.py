"""What a recipe will start and hold: ranks, layers, parameters, bytes, batches and commands, found without a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.config.graph import stage_graph, teacher_rule
from millrace.config.linears import adapted
from millrace.config.model_shape import ModelShape
from millrace.config.schema import (
    FleetConfig,
    LoraConfig,
    MopdStage,
    ParallelConfig,
    Recipe,
    RlhfStage,
    RlStage,
    SamplingStage,
    SftStage,
    StageConfig,
)

BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in float32 whatever the model's data type."""
ADAM_BYTES = 8
"""Two float32 moments a parameter; a bfloat16 model has a float32 master copy besides."""
MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    rank: int
    dp: int
    pp: int
    cp: int
    tp: int
    ep: int
    etp: int
    first_layer: int
    layers: int
    parameters: int
    """Weights this rank holds, vocabulary padding and adapters included."""
    trained: int
    """Those of them that are trained, with LoRA the adapters alone. They have gradients and optimizer state."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    rule: str
    """`best(DOMAIN)`, which is settled when the stage begins, or `stage(NAME)`."""
    domains: tuple[str, ...]
    """Whose prompts this teacher scores."""


@dataclass(frozen=True, kw_only=True)
class JudgePlan:
    name: str
    domains: tuple[str, ...]
    """Whose answers it compares."""
    url: str | None
    """Where it already runs; None when the run starts it."""
    model: str | None
    """What the run starts it from."""
    ranks: int
    """Processes of its server (tensor parallelism); 0 when it already runs."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    name: str
    type: str
    parent: str
    """What it starts from: a stage, or `start`."""
    domains: tuple[str, ...]
    """Whose prompts it trains on."""
    steps: int | None
    """Updates of the policy; None where epochs decide, which needs the data to be read."""
    epochs: float | None
    samples_per_update: int
    """Sequences of one global batch."""
    longest_sequence: int
    """In tokens."""
    micro_batches_at_most: int
    """Micro-batches of one update on one data-parallel replica if every sequence had full length."""
    verdicts_per_step: int
    """Verdicts that judges give in a step, when none of them fails."""
    teachers: tuple[TeacherPlan, ...]
    """One entry for each distinct rule; two rules may still choose one checkpoint, which is then loaded once."""
    placement: str | None
    """Where teachers live; None without teachers."""
    teacher_servers: int
    """vLLM servers started for teachers, at most: one for each distinct rule when they are served."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    run_dir: str
    device: str
    family: str
    parameters: int
    """Of the whole model."""
    world_size: int
    order: str
    """How rank numbers run through the layout, the fastest dimension first."""
    engines: int
    engine_ranks: int
    """Processes of one engine (its tensor parallelism)."""
    addresses: tuple[str, ...]
    ranks: tuple[RankPlan, ...]
    stages: tuple[StagePlan, ...]
    judges: tuple[JudgePlan, ...]
    commands: tuple[str, ...]


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a recipe that fulfils the rules. Raises ConfigError when the model cannot be read."""
    shape, p = ModelShape.from_hf(recipe.model.path), recipe.parallel
    parents = stage_graph(recipe.stages).parents
    return Plan(
        name=recipe.name,
        run_dir=recipe.run_dir,
        device=recipe.trainer.device,
        family=shape.family,
        parameters=shape.parameter_count(),
        world_size=p.world_size,
        order="tp-cp-dp-pp; experts: etp-ep-edp-pp",
        engines=recipe.fleet.engines if recipe.samples else 0,
        engine_ranks=recipe.fleet.tensor_parallel,
        addresses=recipe.fleet.addresses if recipe.samples else (),
        ranks=tuple(rank_plan(rank, recipe, shape) for rank in range(p.world_size)),
        stages=tuple(_stage(stage, parents[stage.name], recipe) for stage in recipe.stages),
        judges=tuple(_judges(recipe)),
        commands=tuple(_commands(recipe)),
    )


def coordinates(rank: int, p: ParallelConfig) -> dict[str, int]:
    """Place of a rank in Megatron-Core's default order, tp-cp-ep-dp-pp.

    Attention and experts are laid over the same ranks of a pipeline stage, each with an order of its own.
    """
    pipeline_ranks = p.tp * p.cp * p.dp
    pp, inside = divmod(rank, pipeline_ranks)
    return {
        "tp": inside % p.tp,
        "cp": inside // p.tp % p.cp,
        "dp": inside // (p.tp * p.cp),
        "etp": inside % p.etp,
        "ep": inside // p.etp % p.ep,
        "pp": pp,
    }


def rank_plan(rank: int, recipe: Recipe, shape: ModelShape) -> RankPlan:
    p, place = recipe.parallel, coordinates(rank, recipe.parallel)
    layers = shape.stage_layers(p.pp, place["pp"])
    shared, experts = _parameters(shape, p, place["pp"])
    trained, trained_experts = shared, experts
    if recipe.model.lora is not None:
        trained, trained_experts = _adapter_parameters(recipe.model.lora, shape, p, place["pp"])
        shared, experts = shared + trained, experts + trained_experts
    held = ADAM_BYTES + (MASTER_BYTES if recipe.model.dtype != "float32" else 0)
    replicas = p.dp * p.cp if recipe.trainer.distributed_optimizer else 1
    expert_replicas = p.tp * p.cp * p.dp // (p.ep * p.etp) if recipe.trainer.distributed_optimizer else 1
    return RankPlan(
        rank=rank,
        **place,
        first_layer=layers.start,
        layers=len(layers),
        parameters=shared + experts,
        trained=trained + trained_experts,
        weight_bytes=(shared + experts) * BYTES[recipe.model.dtype],
        gradient_bytes=(trained + trained_experts) * GRADIENT_BYTES,
        optimizer_bytes=held * (-(-trained // replicas) + -(-trained_experts // expert_replicas)),
    )


def _adapter_parameters(lora: LoraConfig, shape: ModelShape, p: ParallelConfig, pp_rank: int) -> tuple[int, int]:
    """Parameters of one rank's adapters: outside of experts, and of its experts."""
    found = [adapted(shape, layer, lora.targets) for layer in shape.stage_layers(p.pp, pp_rank)]
    flat = [linear for of_layer in found for linear in of_layer]
    shared = sum(linear.adapter_parameters(lora.rank, p.tp) for linear in flat if not linear.expert)
    experts = sum(linear.adapter_parameters(lora.rank, p.etp) for linear in flat if linear.expert)
    return shared, experts * (shape.num_experts // p.ep)


def _parameters(shape: ModelShape, p: ParallelConfig, pp_rank: int) -> tuple[int, int]:
    """Parameters of one rank: those shared by all tokens, and those of its experts."""
    layers = [shape.layer_parameters(layer) for layer in shape.stage_layers(p.pp, pp_rank)]
    shared = sum(layer.cut // p.tp + layer.replicated for layer in layers)
    experts = sum((shape.num_experts // p.ep) * layer.expert // p.etp for layer in layers)
    vocabulary = shape.padded_vocab_size(p.tp) * shape.hidden_size // p.tp
    first, last = pp_rank == 0, pp_rank == p.pp - 1
    if first:
        shared += vocabulary
    if last:
        # With one pipeline stage a tied output layer is the embedding itself; with several the last holds a copy.
        shared += shape.hidden_size + (0 if first and shape.tied_embeddings else vocabulary)
    return shared, experts


def _stage(stage: StageConfig, parent: str, recipe: Recipe) -> StagePlan:
    steps: int | None = 0
    epochs, samples, longest = None, 0, recipe.fleet.max_model_len
    if isinstance(stage, SftStage):
        steps, epochs, samples, longest = stage.steps, stage.epochs, stage.global_batch, stage.max_length
    elif isinstance(stage, SamplingStage):
        updates = stage.updates_per_batch if isinstance(stage, RlStage) else 1
        steps, samples = stage.steps * updates, stage.prompts_per_step * stage.samples_per_prompt // updates
    fitting = max(1, recipe.trainer.max_tokens_per_micro_batch // longest)
    per_replica = -(-samples // recipe.parallel.dp)
    teachers = tuple(_teachers(stage)) if isinstance(stage, MopdStage) else ()
    placement = stage.placement if isinstance(stage, MopdStage) else None
    return StagePlan(
        name=stage.name,
        type=stage.type,
        parent=parent,
        domains=stage.domains if isinstance(stage, SamplingStage) else (),
        steps=steps,
        epochs=epochs,
        samples_per_update=samples,
        longest_sequence=longest,
        micro_batches_at_most=-(-per_replica // fitting),
        verdicts_per_step=_verdicts(stage) if isinstance(stage, RlhfStage) else 0,
        teachers=teachers,
        placement=placement,
        teacher_servers=len(teachers) if placement == "served" else 0,
    )


def _teachers(stage: MopdStage) -> Iterator[TeacherPlan]:
    rules = {domain: str(teacher_rule(text)) for domain, text in stage.teachers.items()}
    for rule in dict.fromkeys(rules.values()):
        yield TeacherPlan(rule=rule, domains=tuple(domain for domain, its in rules.items() if its == rule))


def _verdicts(stage: RlhfStage) -> int:
    """Pairs of all groups of a step, each judged once or in both orders."""
    n = stage.samples_per_prompt
    circle = n if n > 2 else n - 1  # two answers next to each other around a circle are one pair
    pairs = n * (n - 1) // 2 if stage.pairing == "all_pairs" else circle
    return stage.prompts_per_step * pairs * (2 if stage.both_orders else 1)


def _judges(recipe: Recipe) -> Iterator[JudgePlan]:
    for name, judge in recipe.judges.items():
        yield JudgePlan(
            name=name,
            domains=tuple(domain for domain, config in recipe.domains.items() if config.judge == name),
            url=judge.url,
            model=judge.model,
            ranks=judge.engine.tensor_parallel if judge.model is not None else 0,
        )


def _commands(recipe: Recipe) -> Iterator[str]:
    yield f"{recipe.parallel.world_size} x python -m millrace.cascade.worker {recipe.run_dir}"
    if recipe.samples and recipe.fleet.engines:
        yield f"{recipe.fleet.engines} x {_server(recipe.model.path, recipe.fleet)}"
    for name, judge in recipe.judges.items():
        if judge.model is not None:
            yield f"{judge.engine.engines} x {_server(f'{judge.model}, the judge {name},', judge.engine)}"
    for stage in recipe.stages:
        if isinstance(stage, MopdStage) and stage.placement == "served":
            rules = [teacher.rule for teacher in _teachers(stage)]
            models = f"{', '.join(rules)}, the teachers of {stage.name},"
            yield f"{len(rules)} x {_server(models, stage.teacher_engine)}"


def _server(model: str, config: FleetConfig) -> str:
    ranks = f" over {config.tensor_parallel} ranks" if config.tensor_parallel > 1 else ""
    return f"vLLM server of {model} on {config.interface}{ranks}"


def to_json(plan: Plan) -> str:
    return json.dumps(dataclasses.asdict(plan), indent=2)


def render_text(plan: Plan) -> str:
    """The plan as aligned text."""
    engines = (
        f"{plan.engines} vLLM of {_ranks(plan.engine_ranks)}" if plan.engines else ", ".join(plan.addresses) or "none"
    )
    head = [
        ("run", f"{plan.name} in {Path(plan.run_dir)}"),
        ("model", f"{plan.family}, {_short(plan.parameters)} parameters"),
        ("trainer", f"{_ranks(plan.world_size)}, device {plan.device}, order {plan.order}"),
        ("engines", engines),
        *(("start", command) for command in plan.commands),
    ]
    tables = (head, _rank_table(plan), _stage_table(plan), _teacher_table(plan), _judge_table(plan))
    return "\n\n".join(_aligned(rows) for rows in tables if len(rows) > 1)


Table = list[tuple[str, ...]]


def _rank_table(plan: Plan) -> Table:
    titles = (
        "rank",
        "pp",
        "dp",
        "cp",
        "tp",
        "ep",
        "etp",
        "layers",
        "parameters",
        "trained",
        "weights",
        "gradients",
        "optimizer",
    )
    return [titles, *map(_rank_row, plan.ranks)]


def _stage_table(plan: Plan) -> Table:
    titles = ("stage", "type", "from", "updates", "sequences", "longest", "micro-batches at most")
    return [titles, *map(_stage_row, plan.stages)]


def _stage_row(s: StagePlan) -> tuple[str, ...]:
    if not s.samples_per_update:
        return (s.name, s.type, s.parent, "-", "-", "-", "-")
    updates = str(s.steps) if s.steps is not None else f"{s.epochs:g} epochs"
    batches = f"{s.micro_batches_at_most} a replica"
    return (s.name, s.type, s.parent, updates, str(s.samples_per_update), f"{s.longest_sequence} tokens", batches)


def _teacher_table(plan: Plan) -> Table:
    rows: Table = [("teachers of", "rule", "domains", "placement")]
    for stage in plan.stages:
        rows += [(stage.name, t.rule, ", ".join(t.domains), stage.placement or "") for t in stage.teachers]
    return rows


def _judge_table(plan: Plan) -> Table:
    rows: Table = [("judge", "domains", "where", "verdicts a step")]
    for judge in plan.judges:
        asking = [s for s in plan.stages if s.verdicts_per_step and set(s.domains) & set(judge.domains)]
        verdicts = ", ".join(f"{stage.name} {stage.verdicts_per_step}" for stage in asking)
        where = judge.url or f"vLLM of {_ranks(judge.ranks)}, {judge.model}"
        rows.append((judge.name, ", ".join(judge.domains), where, verdicts or "none"))
    return rows


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _rank_row(r: RankPlan) -> tuple[str, ...]:
    places = (r.rank, r.pp, r.dp, r.cp, r.tp, r.ep, r.etp)
    layers = f"{r.first_layer}-{r.first_layer + r.layers - 1}"
    sizes = (_bytes(n) for n in (r.weight_bytes, r.gradient_bytes, r.optimizer_bytes))
    return (*map(str, places), layers, _short(r.parameters), _short(r.trained), *sizes)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def _bytes(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
