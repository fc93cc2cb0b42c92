"""The plan of a recipe on a cluster: which node runs what, the memory of every role, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.config.placement import Placement, place
from millrace.config.precision_rules import cluster_problems_of_engines, cluster_problems_of_precision
from millrace.config.rules import check_recipe, layout_of_recipe
from millrace.config.schema import Recipe
from millrace.planning import estimate
from millrace.planning.assumed import MEMORY
from millrace.planning.changes import Change, helpful_changes
from millrace.planning.estimate import StageEstimate, estimate_stages
from millrace.planning.hardware import GPUS, SPEED
from millrace.planning.memory import Memory, MemoryModel, Role, Shortage, gib_text
from millrace.planning.tables import aligned


@dataclass(frozen=True, kw_only=True)
class Unfit:
    """Something that does not fit, and the changes that would help most."""

    shortage: Shortage
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        if not self.changes:
            return f"{self.shortage.sentence}; no single change of the recipe makes it smaller, so take another cluster"
        helps = "; ".join(f"{change} ({gib_text(change.saves)} less)" for change in self.changes)
        return f"{self.shortage.sentence}. What helps most: {helps}"


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    recipe: str
    cluster: str
    placement: Placement
    memory: Memory
    unfit: tuple[Unfit, ...]
    estimates: tuple[StageEstimate, ...]
    """Of each stage that trains; none where the GPU's speed is not known."""
    no_estimate: str
    """Why there are none."""
    assumed: dict[str, str]
    """What was taken for granted, each with its reason."""
    before_it_runs: tuple[str, ...]
    """What `millrace check` still finds: files that are not there, environments that are not built."""

    @property
    def fits(self) -> bool:
        return not self.unfit


def plan_on_cluster(recipe: Recipe, cluster: ClusterConfig) -> ClusterPlan:
    """The plan of a recipe on a cluster. Data need not be there yet, the model's config.json must.

    Raises ConfigError when the model cannot be read, the layout cannot hold it, or the nodes have no place for it.
    """
    shape = ModelShape.from_hf(recipe.model.path)
    problems = layout_of_recipe(recipe, shape)
    if recipe.trainer.device == "cuda" and not cluster.node.gpus:
        problems.append(f"trainer.device is cuda, but the nodes of {cluster.name} have no GPUs; set it to cpu or auto")
    if recipe.samples and recipe.fleet.transport in ("nccl", "ipc") and not cluster.node.gpus:
        problems.append(
            f"fleet.transport is {recipe.fleet.transport}, which needs CUDA, but the nodes of {cluster.name} have no "
            "GPUs; set it to disk"
        )
    problems += [*cluster_problems_of_precision(recipe, cluster), *cluster_problems_of_engines(recipe, cluster)]
    if problems:
        raise ConfigError(problems)
    placement = place(recipe, cluster)
    memory = MemoryModel(recipe, cluster, shape).whole(placement)
    unfit = [
        Unfit(shortage=shortage, changes=tuple(helpful_changes(recipe, cluster, shape, shortage)))
        for shortage in memory.shortages
    ]
    estimates: tuple[StageEstimate, ...] = ()
    reason = ""
    try:
        estimates = estimate_stages(recipe, cluster, shape)
    except ConfigError as error:
        reason = str(error)
    return ClusterPlan(
        recipe=recipe.name,
        cluster=cluster.name,
        placement=placement,
        memory=memory,
        unfit=tuple(unfit),
        estimates=estimates,
        no_estimate=reason,
        assumed=_assumed(cluster, timed=not reason),
        before_it_runs=tuple(check_recipe(recipe)),
    )


def to_json(plan: ClusterPlan) -> str:
    return json.dumps(as_data(plan), indent=2)


def as_data(plan: ClusterPlan) -> dict[str, Any]:
    """The plan as plain values; bytes everywhere."""
    data = dataclasses.asdict(plan)
    data["fits"] = plan.fits
    data["unfit"] = [
        {
            "role": unfit.shortage.role,
            "sentence": str(unfit),
            "missing": unfit.shortage.missing,
            "changes": [{"overrides": str(change), "saves": change.saves} for change in unfit.changes],
        }
        for unfit in plan.unfit
    ]
    return data


def render_text(plan: ClusterPlan) -> str:
    """The plan as aligned text."""
    blocks = [
        _head(plan),
        aligned([("nodes", "what runs there"), *_places(plan.placement)]),
        aligned(
            [("role", "ranks", "on the GPU" if plan.memory.gpu_bytes else "in memory", "on the host", "of it")]
            + [_role_row(role) for role in plan.memory.roles]
        ),
        "\n".join(f"{role.name}: {role.note}" for role in plan.memory.roles if role.note),
        "\n".join(str(unfit) for unfit in plan.unfit) or "everything fits",
        estimate.render_text(plan.estimates) if plan.estimates else f"no times: {plan.no_estimate}",
        "\n".join(["assumed:", *(f"  {name}: {text}" for name, text in plan.assumed.items())]),
    ]
    if plan.before_it_runs:
        count = len(plan.before_it_runs)
        blocks.append(f"before it runs, {count} problem{'s' if count > 1 else ''} that millrace check names must go")
    return "\n\n".join(block for block in blocks if block)


def _head(plan: ClusterPlan) -> str:
    memory = plan.memory
    node = f"{gib_text(memory.host_bytes)} of host memory"
    node += f", {gib_text(memory.gpu_bytes)} a GPU" if memory.gpu_bytes else ""
    return aligned([("run", plan.recipe), ("cluster", f"{plan.cluster}, {plan.placement.nodes} nodes of {node}")])


def _places(placement: Placement) -> list[tuple[str, str]]:
    """Nodes with what runs on them; neighbours that run the same kinds of things in one row."""
    texts = []
    for node in range(placement.nodes):
        ranks = [f"{one.ranks} trainer ranks" for one in placement.trainer if one.node == node]
        kinds = [server.kind for server in placement.servers if server.node == node]
        servers = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        verifiers = [f"{one.workers} verifiers" for one in placement.verifiers if one.node == node]
        texts.append(", ".join([*ranks, *servers, *verifiers]) or "nothing")
    rows: list[tuple[str, str]] = []
    first = 0
    for node in range(1, len(texts) + 1):
        if node == len(texts) or texts[node] != texts[first]:
            rows.append((f"{first}" if node - 1 == first else f"{first}-{node - 1}", texts[first]))
            first = node
    return rows


def _role_row(role: Role) -> tuple[str, ...]:
    items = sorted({**role.device, **{f"host {k}": v for k, v in role.host.items()}}.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {gib_text(size)}" for name, size in items if size)
    return (role.name, str(role.ranks), gib_text(role.device_bytes), gib_text(role.host_bytes), shown)


def _assumed(cluster: ClusterConfig, *, timed: bool) -> dict[str, str]:
    found = {name: str(assumed) for name, assumed in MEMORY.items()}
    if timed:
        gpu = GPUS[str(cluster.node.gpu)]
        peak = f"{gpu.flops / 1e12:g} TFLOP/s of dense bfloat16 and {gpu.memory_bytes_s / 1e12:g} TB/s: {gpu.source}"
        network = cluster.network
        found["gpu"] = f"{cluster.node.gpu}, {peak}"
        found["network"] = (
            f"{network.intra_node_gb_s:g} GB/s of a GPU inside a node, {network.inter_node_gb_s:g} GB/s to others: "
            "the cluster file"
        )
        found |= {name: str(assumed) for name, assumed in SPEED.items()}
    return found
