"""What a step of each stage takes on a cluster: a roofline for each phase, and the rollouts simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from millrace.config.cluster import ClusterConfig
from millrace.config.model_shape import ModelShape
from millrace.config.schema import MopdStage, Recipe, SamplingStage
from millrace.planning.cost import CostModel, Seconds, Work, work_of
from millrace.planning.flops import forward_flops, train_flops
from millrace.planning.hardware import SPEED
from millrace.planning.simulate import Lengths, Mode, Outcome, Setting, modes, simulate
from millrace.planning.tables import aligned

STALENESS = 2
"""Updates that the bounded mode allows in a plan."""
WAYS: dict[Mode, str] = {
    "synchronous": "synchronous",
    "one_step_off": "one step off",
    "bounded": f"staleness up to {STALENESS}",
}
"""How the ways of working are told."""
MOST_SIMULATED = 4
"""Engines that are simulated; of a larger fleet so many with their part of the batch."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    stage: str
    type: str
    sequences: int
    tokens: float
    """Of a step, prompts included."""
    phases: Seconds
    """Seconds of a synchronous step: rollout, score, train, sync."""
    train_parts: Seconds
    flops: float
    """Of a step, training alone."""
    share_of_peak: float
    """Those operations over what the trainer's GPUs can do in the time of training."""
    outcomes: tuple[Outcome, ...]
    """Of the ways of working, the synchronous first; empty for a stage that samples nothing."""

    @property
    def step_s(self) -> float:
        return sum(self.phases.values())


def estimate_stages(recipe: Recipe, cluster: ClusterConfig, shape: ModelShape) -> tuple[StageEstimate, ...]:
    """The estimate of every stage that trains. Raises ConfigError for nodes whose speed is not known."""
    return tuple(_stages(recipe, CostModel(recipe, cluster, shape)))


def _stages(recipe: Recipe, model: CostModel) -> Iterator[StageEstimate]:
    done: dict[Work, tuple[Outcome, ...]] = {}
    for stage in recipe.stages:
        work = work_of(stage, recipe)
        if work is None:
            continue
        parts = model.train_seconds(work)
        train, score = sum(parts.values()), model.score_seconds(work)
        phases: Seconds = {}
        outcomes: tuple[Outcome, ...] = ()
        if isinstance(stage, SamplingStage):
            if work not in done:
                done[work] = tuple(
                    simulated(model, work, train + score, mode, bound) for mode, bound in modes(STALENESS)
                )
            outcomes = done[work]
            phases = {"rollout": outcomes[0].rollout_s, "score": score, "train": train, "sync": model.sync_seconds()}
            if isinstance(stage, MopdStage) and stage.placement == "served":
                del phases["score"]
        else:
            phases = {"train": train}
        flops = work.tokens * train_flops(model.shape, work.length, recipe.trainer.recompute)
        useful = work.tokens * 3 * forward_flops(model.shape, work.length).total
        yield StageEstimate(
            stage=stage.name,
            type=stage.type,
            sequences=work.sequences,
            tokens=work.tokens,
            phases=phases,
            train_parts=parts,
            flops=flops,
            share_of_peak=useful / (train * model.gpu.flops * recipe.parallel.world_size),
            outcomes=outcomes,
        )


def simulated(
    model: CostModel,
    work: Work,
    train_s: float,
    mode: Mode,
    bound: int,
    steps: int = 3,
    most_engines: int = MOST_SIMULATED,
) -> Outcome:
    """A few steps of a way of working."""
    fleet = model.recipe.fleet
    engines = fleet.engines or len(fleet.addresses) or 1
    part = min(1.0, most_engines / engines)
    outcome = simulate(
        Setting(
            mode=mode,
            engines=min(engines, most_engines),
            slots=model.slots(work.prompt + work.longest),
            step_time=model.decoding(work.prompt + work.answer / 2).seconds,
            prefill_s=model.prefill_seconds(work.prompt),
            batch=max(1, round(work.sequences * part)),
            lengths=Lengths(mean=work.answer, longest=work.longest, spread=SPEED["answer_spread"].value),
            train_s=train_s,
            sync_s=model.sync_seconds(),
            steps=steps,
            staleness=bound,
        )
    )
    return replace(outcome, tokens_s=outcome.tokens_s / part)


def render_text(estimates: Sequence[StageEstimate]) -> str:
    """Two tables: the phases of a synchronous step of each stage, and the ways of working."""
    head = ("stage", "sequences", "tokens", "step", "rollout", "score", "train", "sync", "share of peak")
    rows = [head, *map(_phases, estimates)]
    ways: list[tuple[str, ...]] = [
        ("stage", "way of working", "step", "trainer idle", "fleet idle", "updates old", "tokens/s")
    ]
    ways += [_way(estimate, outcome) for estimate in estimates for outcome in estimate.outcomes]
    tables = [aligned(table) for table in (rows, ways) if len(table) > 1]
    note = "stages run synchronously, or with one_step_off: true one step off; bounded staleness is simulated only"
    return "\n\n".join([*tables, *([note] if len(ways) > 1 else [])])


def _phases(e: StageEstimate) -> tuple[str, ...]:
    phases = (f"{e.phases[name]:.1f} s" if name in e.phases else "-" for name in ("rollout", "score", "train", "sync"))
    return (e.stage, str(e.sequences), f"{e.tokens / 1e6:.2f}M", f"{e.step_s:.1f} s", *phases, f"{e.share_of_peak:.0%}")


def _way(estimate: StageEstimate, o: Outcome) -> tuple[str, ...]:
    idle = (f"{o.trainer_idle:.0%}", f"{o.fleet_idle:.0%}")
    return (estimate.stage, WAYS[o.mode], f"{o.step_s:.1f} s", *idle, f"{o.staleness:.2f}", f"{o.tokens_s:.0f}")
