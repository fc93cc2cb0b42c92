"""What a run cost, by stage, and what one solved problem cost.

A **solved answer** is an answer sampled for training with a reward of at least 1. The cost per solved answer is all
that the stage spent (sampled tokens, FLOPs, seconds; sampling, scoring and training together) divided by the number of
such answers: it falls when the policy solves more, answers shorter or runs faster. It is not divided by the held-out
problems gained: that difference is small, noisy and may be negative, while its price would look exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from millrace.config.schema import SamplingStage
from millrace.observe.report.record import RunRecord, StageRecord

DEFINITION = (
    "A solved answer is an answer sampled for training with a reward of at least 1. Its cost is all that the stage "
    "spent (sampling, scoring, training, weight syncs) divided by the number of such answers. RLHF has none: its "
    "rewards say how good an answer is beside the others of its group."
)


@dataclass(frozen=True)
class Cost:
    """What a stage, or a run, spent. None: not recorded."""

    seconds: float | None
    tokens_trained: float | None
    tokens_sampled: float | None
    flops: float | None
    solved: float | None
    """Training answers with a reward of at least 1."""

    def per_solved(self, spent: float | None) -> float | None:
        return spent / self.solved if spent is not None and self.solved else None


def stage_cost(stage: StageRecord) -> Cost:
    """What the ledger says at the stage's end; before that, the sum of what its steps have recorded."""
    end = stage.finished or {}

    def total(fact: str, metric: str) -> float | None:
        return end[fact] if end.get(fact) is not None else _sum(row.get(metric) for row in stage.rows)

    return Cost(
        seconds=total("seconds", "time/step"),
        tokens_trained=total("tokens_trained", "tokens"),
        tokens_sampled=total("tokens_sampled", "tokens/sampled"),
        flops=total("flops", "flops"),
        solved=_solved(stage),
    )


def _solved(stage: StageRecord) -> float | None:
    """Share of solved answers times answers, summed over the steps."""
    if stage.type == "rlhf" or not isinstance(stage.config, SamplingStage):
        return None
    n = stage.config.samples_per_prompt
    shares = [(row.get("reward/solved"), row.get("groups/played")) for row in stage.rows]
    return _sum(share * groups * n if share is not None and groups is not None else None for share, groups in shares)


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum of what is there; None when nothing is."""
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def total_cost(costs: Sequence[Cost]) -> Cost:
    """The run's cost; its solved answers and what they cost are not summed over stages of different domains."""
    return Cost(
        seconds=_sum(cost.seconds for cost in costs),
        tokens_trained=_sum(cost.tokens_trained for cost in costs),
        tokens_sampled=_sum(cost.tokens_sampled for cost in costs),
        flops=_sum(cost.flops for cost in costs),
        solved=None,
    )


def costs(run: RunRecord) -> dict[str, Cost]:
    """Stage -> cost, of the stages that have begun."""
    return {stage.name: stage_cost(stage) for stage in run.stages if stage.status != "waiting"}
