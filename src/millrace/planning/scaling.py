"""How a stage's step changes with the number of GPUs, its batch staying as it is.

Trainer and fleet grow together, by data parallelism and by engines; tensor, pipeline, context and expert parallelism
stay. All engines are simulated. Whether the optimizer's state fits with few replicas is not asked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.config.schema import MopdStage, Recipe, RlStage
from millrace.planning.cost import CostModel, Work, work_of
from millrace.planning.estimate import STALENESS, WAYS, simulated
from millrace.planning.simulate import Outcome, modes
from millrace.planning.tables import aligned

GPUS = (8, 32, 128, 512, 2048, 8192, 16384)
ALL = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Size:
    gpus: int
    """Of trainer and fleet together, as near to the asked number as whole replicas and engines come."""
    trainer: int
    engines: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    stage: str
    sequences: int
    sizes: tuple[Size, ...]


def scaled(recipe: Recipe, cluster: ClusterConfig, shape: ModelShape) -> Scaling:
    """The stage with the longest answers at each size. Raises ConfigError without one, or for unknown GPUs."""
    stages = [stage for stage in recipe.stages if isinstance(stage, RlStage | MopdStage)]
    if not stages:
        raise ConfigError("--scale simulates rollouts, but no stage of the recipe samples")
    stage = max(stages, key=lambda one: one.sampling.max_response_tokens)
    work = work_of(stage, recipe)
    assert work is not None  # a stage that samples has work
    return Scaling(stage=stage.name, sequences=work.sequences, sizes=tuple(_sizes(recipe, cluster, shape, work)))


def _sizes(recipe: Recipe, cluster: ClusterConfig, shape: ModelShape, work: Work) -> Iterator[Size]:
    p, fleet = recipe.parallel, recipe.fleet
    replica, tp = p.world_size // p.dp, fleet.tensor_parallel
    engines = fleet.engines or len(fleet.addresses) or 1
    share = p.world_size / (p.world_size + engines * tp)
    # As many replicas at a time as the experts' ranks need.
    whole = p.ep * p.etp // math.gcd(p.tp * p.cp, p.ep * p.etp)
    seen: set[tuple[int, int]] = set()
    for gpus in GPUS:
        dp = max(1, round(share * gpus / replica / whole)) * whole
        count = max(1, round((gpus - dp * replica) / tp))
        size = dp * replica + count * tp
        if size > 1.5 * gpus or (dp, count) in seen:
            continue  # one replica and one engine are more than that
        seen.add((dp, count))
        other = replace(recipe, parallel=replace(p, dp=dp), fleet=replace(fleet, engines=count, addresses=()))
        model = CostModel(other, cluster, shape)
        train = sum(model.train_seconds(work).values()) + model.score_seconds(work)
        outcomes = (
            simulated(model, work, train, mode, bound, steps=2, most_engines=ALL) for mode, bound in modes(STALENESS)
        )
        yield Size(gpus=size, trainer=dp * replica, engines=count, outcomes=tuple(outcomes))


def render_text(found: Scaling) -> str:
    head = (
        "GPUs",
        "trainer",
        "engines",
        "way of working",
        "step",
        "trainer idle",
        "fleet idle",
        "updates old",
        "tokens/s",
    )
    rows: list[tuple[str, ...]] = [head]
    for size in found.sizes:
        for o in size.outcomes:
            place = (str(size.gpus), str(size.trainer), str(size.engines), WAYS[o.mode], f"{o.step_s:.1f} s")
            rows.append(
                (*place, f"{o.trainer_idle:.0%}", f"{o.fleet_idle:.0%}", f"{o.staleness:.2f}", f"{o.tokens_s:.0f}")
            )
    return f"{found.stage}, {found.sequences} sequences a step, on more and fewer GPUs:\n{aligned(rows)}"
