"""Where the servers of a run go.

On one machine each gets GPUs of it: behind the trainer's ranks first the fleet's engines, then the judges', then the
teachers'. On CPU nothing reads these numbers. In a job of several nodes each goes where the job's placement says, and
the agent of that node starts it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from millrace.config.placement import ServerPlace
from millrace.config.schema import FleetConfig, Recipe
from millrace.rollout.member import FleetError
from millrace.rollout.rendezvous import Rendezvous
from millrace.rollout.server import Device, engine_device


@dataclass(frozen=True)
class Seats:
    """Where the servers of one fleet go: GPUs of this machine, or places on the nodes of a job."""

    gpus: Sequence[str] = ()
    """Numbers or names as CUDA_VISIBLE_DEVICES takes them, `tensor_parallel` for each server."""
    peers: Sequence[str] = ()
    """Those of the trainer's ranks, whose memory each server opens by CUDA IPC."""
    meeting: Rendezvous | None = None
    """The rendezvous of the job whose nodes start the servers."""
    places: Sequence[ServerPlace] = ()
    """One for each server, with `meeting`."""


HERE = Seats()
"""On this machine, on whatever devices it has."""


def fleet_seats(recipe: Recipe) -> Seats:
    """Those of the fleet's engines."""
    shared = recipe.parallel.world_size if recipe.fleet.transport == "ipc" else 0
    return _on_nodes("engine") or Seats(fleet_gpus(recipe), visible_gpus(range(shared)))


def judge_seats(recipe: Recipe, name: str) -> Seats:
    """Those of a judge's servers."""
    return _on_nodes(f"judge-{name}") or Seats(judge_gpus(recipe, name))


def teacher_seats(recipe: Recipe, engine: FleetConfig, number: int) -> Seats:
    """That of the server of the teacher `number`, counted from 0."""
    seats = _on_nodes("teacher")
    if seats is None:
        return Seats(teacher_gpus(recipe, engine, number))
    return Seats(meeting=seats.meeting, places=seats.places[number : number + 1])


def _on_nodes(kind: str) -> Seats | None:
    """The places of a kind of server in the job that this process is a rank of; None on one machine."""
    meeting = Rendezvous.of_environment()
    return Seats(meeting=meeting, places=meeting.placement.servers_of(kind)) if meeting else None


def fleet_gpus(recipe: Recipe, *, beside_trainer: bool = True) -> list[str]:
    """Those behind the trainer's, or the trainer's own with CUDA IPC; without a trainer the first ones."""
    first = recipe.parallel.world_size if beside_trainer and recipe.fleet.transport != "ipc" else 0
    return visible_gpus(range(first, first + _count(recipe.fleet)))


def with_peers(own: Sequence[str], peers: Sequence[str]) -> list[str]:
    """What a server is to see: vLLM computes on the first ones it sees, and opens memory on any of them."""
    return [*own, *(gpu for gpu in peers if gpu not in own)]


def judge_gpus(recipe: Recipe, name: str) -> list[str]:
    """Those of a judge's engines: behind the fleet's, and those of the judges named before it."""
    first = _behind_fleet(recipe)
    for other, config in recipe.judges_used.items():
        count = _count(config.engine) if config.model else 0
        if other == name:
            return visible_gpus(range(first, first + count))
        first += count
    raise KeyError(name)


def teacher_gpus(recipe: Recipe, engine: FleetConfig, number: int) -> list[str]:
    """Those of the teacher `number` (counted from 0) of a stage that serves its teachers: behind all judges'."""
    judges = sum(_count(config.engine) for config in recipe.judges_used.values() if config.model)
    first = _behind_fleet(recipe) + judges + number * _count(engine)
    return visible_gpus(range(first, first + _count(engine)))


def visible_gpus(wanted: Sequence[int], device: Device | None = None) -> list[str]:
    """The `wanted` places among the devices that CUDA_VISIBLE_DEVICES names, which is how the trainer's ranks count:
    its entries as they stand there, numbers or GPU-... or MIG-... names. Unset or empty it names all devices.

    `device`: where servers run; found out when absent. Raises FleetError where they run on CUDA and too few are named.
    """
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    needed = max(wanted, default=-1) + 1
    if visible and needed <= len(visible):
        return [visible[place] for place in wanted]
    if visible and (device or engine_device()) == "cuda":
        raise FleetError(
            f"the trainer's ranks and the servers up to this one want {needed} GPUs, but CUDA_VISIBLE_DEVICES names "
            f"{len(visible)} ({','.join(visible)}); let it name more, or lower parallel.dp, engines or tensor_parallel"
        )
    return [str(place) for place in wanted]


def _behind_fleet(recipe: Recipe) -> int:
    """The first GPU that neither the trainer nor the fleet uses."""
    own = 0 if recipe.fleet.transport == "ipc" else recipe.parallel.world_size
    return max(recipe.parallel.world_size, own + _count(recipe.fleet))


def _count(engine: FleetConfig) -> int:
    return engine.engines * engine.tensor_parallel
