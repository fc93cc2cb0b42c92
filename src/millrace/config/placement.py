"""Which node of a cluster runs what: the trainer's ranks first, the vLLM servers behind them or beside them, and behind
all the nodes that test programs, if any do.

Nodes are numbered as the scheduler lists them. The launchers render their jobs from a placement, the plan counts memory
by it, and a running job reads it to know what each node does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.graph import teacher_rule
from millrace.config.schema import FleetConfig, MopdStage, Recipe


@dataclass(frozen=True, kw_only=True)
class NodeRanks:
    """The trainer's ranks on one node."""

    node: int
    first_rank: int
    ranks: int
    """They take the node's GPUs 0, 1, ..."""


@dataclass(frozen=True, kw_only=True)
class ServerPlace:
    """One vLLM server."""

    kind: str
    """`engine` for the fleet's, `judge-NAME`, `teacher` for those of whichever stage serves its teachers."""
    index: int
    """Its number among the servers of its kind."""
    node: int
    gpus: tuple[int, ...]
    """Those of its node that it takes; on nodes of CPUs the slots it counts for."""


@dataclass(frozen=True, kw_only=True)
class VerifierPlace:
    """A node that tests programs, and does nothing else."""

    node: int
    workers: int
    """Programs that it tests at one time."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    nodes: int
    trainer: tuple[NodeRanks, ...]
    servers: tuple[ServerPlace, ...]
    verifiers: tuple[VerifierPlace, ...] = ()

    def servers_of(self, kind: str) -> tuple[ServerPlace, ...]:
        return tuple(server for server in self.servers if server.kind == kind)


def write_placement(path: Path, placement: Placement) -> None:
    """Write a placement as JSON, for the nodes of a job."""
    path.write_text(json.dumps(dataclasses.asdict(placement), indent=2) + "\n", encoding="utf-8")


def read_placement(path: Path) -> Placement:
    """What `write_placement` wrote."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    servers = (ServerPlace(**{**server, "gpus": tuple(server["gpus"])}) for server in facts["servers"])
    trainer = (NodeRanks(**ranks) for ranks in facts["trainer"])
    verifiers = (VerifierPlace(**verifier) for verifier in facts["verifiers"])
    return Placement(nodes=facts["nodes"], trainer=tuple(trainer), servers=tuple(servers), verifiers=tuple(verifiers))


@dataclass(frozen=True)
class _Wanted:
    kind: str
    index: int
    size: int
    """Ranks of the server."""


def place(recipe: Recipe, cluster: ClusterConfig) -> Placement:
    """Where each rank and each server of a recipe runs on a cluster.

    Raises ConfigError when they do not fit the nodes, an engine does not fit one node, or the weights' way to the
    engines does not lead from one node to another.
    """
    wanted, slots = list(_wanted(recipe)), cluster.node.places
    too_large = {server.kind: server.size for server in wanted if server.size > slots}
    problems = [
        f"{kind} wants {size} ranks on one node, but a node of {cluster.name} takes {slots}; lower its tensor_parallel"
        for kind, size in too_large.items()
    ]
    trainer, problem = _trainer(recipe, cluster)
    problems += problem
    if problems:
        raise ConfigError(problems)
    servers = _servers(recipe, cluster, trainer, wanted)
    last = max(*(ranks.node for ranks in trainer), *(server.node for server in servers), 0)
    if recipe.fleet.transport == "ipc" and recipe.samples and len(trainer) > 1:
        raise ConfigError(
            f"fleet.transport is ipc, which reaches the GPUs of one node, but the trainer's ranks are on "
            f"{len(trainer)} nodes; use nccl, with engines on GPUs of their own, or a layout that one node holds"
        )
    verifying = recipe.placement.verifier_nodes
    verifiers = tuple(VerifierPlace(node=last + 1 + n, workers=cluster.node.cores) for n in range(verifying))
    placement = Placement(nodes=last + 1 + verifying, trainer=trainer, servers=servers, verifiers=verifiers)
    if placement.nodes > cluster.nodes:
        wanted_by = f"{len(trainer)} of them for the trainer's {recipe.parallel.world_size} ranks"
        wanted_by += f" and {verifying} to verify programs" if verifying else ""
        less = "parallel.dp, fleet.engines or placement.verifier_nodes" if verifying else "parallel.dp or fleet.engines"
        raise ConfigError(
            f"the run wants {placement.nodes} nodes, {wanted_by}, but {cluster.name} has {cluster.nodes}; lower "
            f"{less}, or name more nodes in the cluster file"
        )
    away = [server for server in placement.servers_of("engine") if server.node]
    if away and recipe.fleet.transport == "shared_memory":
        raise ConfigError(
            f"fleet.transport is shared_memory, which does not reach the {len(away)} engines on other nodes than rank "
            "0's; set it to nccl, or to gloo or disk on nodes of CPUs"
        )
    return placement


def _trainer(recipe: Recipe, cluster: ClusterConfig) -> tuple[tuple[NodeRanks, ...], list[str]]:
    """The trainer's ranks, spread evenly, and what is wrong with that."""
    world, slots = recipe.parallel.world_size, cluster.node.places
    fewest = next(n for n in range(-(-world // slots), world + 1) if world % n == 0)
    nodes = recipe.placement.trainer_nodes or fewest
    each, rest = divmod(world, nodes)
    if rest:
        return (), [f"placement.trainer_nodes {nodes} does not divide the {world} ranks of parallel"]
    if each > slots:
        return (), [
            f"placement.trainer_nodes {nodes} gives each node {each} of the {world} ranks, but a node of "
            f"{cluster.name} takes {slots}; set it to {fewest} or more"
        ]
    if recipe.trainer.overlap_tensor_parallel and each % recipe.parallel.tp:
        return (), [
            f"trainer.overlap_tensor_parallel needs the tensor-parallel ranks on one node, but {each} ranks of a node "
            f"are no multiple of parallel.tp {recipe.parallel.tp}; change the layout, or leave it out"
        ]
    return tuple(NodeRanks(node=node, first_rank=node * each, ranks=each) for node in range(nodes)), []


def _wanted(recipe: Recipe) -> Iterator[_Wanted]:
    """Every vLLM server of a run; those of teachers live for their stage alone, so that stages share their places."""
    groups: list[tuple[str, FleetConfig, int]] = []
    if recipe.samples:
        groups.append(("engine", recipe.fleet, recipe.fleet.engines))
    groups += [
        (f"judge-{n}", judge.engine, judge.engine.engines) for n, judge in recipe.judges_used.items() if judge.model
    ]
    served = [s for s in recipe.stages if isinstance(s, MopdStage) and s.placement == "served"]
    for kind, engine, count in groups:
        for index in range(count):
            yield _Wanted(kind, index, engine.tensor_parallel)
    for number in range(max((teacher_count(stage) for stage in served), default=0)):
        sizes = [stage.teacher_engine.tensor_parallel for stage in served if teacher_count(stage) > number]
        yield _Wanted("teacher", number, max(sizes))


def teacher_count(stage: MopdStage) -> int:
    """Distinct teachers of a stage: as many servers when they are served."""
    return len({str(teacher_rule(text)) for text in stage.teachers.values()})


def _servers(
    recipe: Recipe, cluster: ClusterConfig, trainer: Sequence[NodeRanks], wanted: Sequence[_Wanted]
) -> tuple[ServerPlace, ...]:
    slots, nodes = cluster.node.places, recipe.placement.server_nodes
    beside = {ranks.node: ranks.ranks for ranks in trainer}
    lent: tuple[ServerPlace, ...] = ()
    if recipe.fleet.transport == "ipc":  # engines live on the trainer's own GPUs
        lent = _pack([one for one in wanted if one.kind == "engine"], dict.fromkeys(beside, 0), slots) or ()
        wanted = [one for one in wanted if one.kind != "engine"]
    if nodes == 0 or (nodes is None and len(trainer) == 1):
        found = _pack(wanted, beside, slots)
        if found is not None:
            return (*lent, *found)
        if nodes == 0:
            raise ConfigError(
                f"placement.server_nodes is 0, but the nodes of the trainer's ranks have no room for {len(wanted)} "
                f"vLLM servers beside them ({slots} places a node); leave it out, or lower fleet.engines"
            )
    fewest = -(-sum(one.size for one in wanted) // slots)
    for count in [nodes] if nodes else range(fewest, len(wanted) + 1):
        found = _pack(wanted, {len(trainer) + n: 0 for n in range(count)}, slots)
        if found is not None:
            return (*lent, *found)
    raise ConfigError(
        f"placement.server_nodes {nodes} has no room for {len(wanted)} vLLM servers of "
        f"{sum(one.size for one in wanted)} ranks ({slots} places a node); leave it out, or lower fleet.engines"
    )


def _pack(wanted: Sequence[_Wanted], taken: dict[int, int], slots: int) -> tuple[ServerPlace, ...] | None:
    """Give each server the emptiest node, the largest servers first; None when one finds no room.

    taken: places of each node that are not free.
    """
    taken, found = dict(taken), []
    for one in sorted(wanted, key=lambda server: -server.size):
        node = min(taken, key=lambda n: (taken[n], n), default=None)
        if node is None or taken[node] + one.size > slots:
            return None
        gpus = tuple(range(taken[node], taken[node] + one.size))
        found.append(ServerPlace(kind=one.kind, index=one.index, node=node, gpus=gpus))
        taken[node] += one.size
    return tuple(found)
