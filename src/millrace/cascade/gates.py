"""Gates: did a stage gain what it should, and did it leave the other domains as good as they were? Pure.

With p the held-out pass rate and h half of its 95% interval, in points (percent), the change of a domain is

    change = p_after - p_before,    half width = sqrt(h_after^2 + h_before^2)

as if the two were independent. They are measured on the same prompts, so the true interval is rather narrower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from millrace.cascade.history import Row, Scores
from millrace.config.graph import other_domains, own_domains
from millrace.config.schema import GateConfig, Recipe, StageConfig
from millrace.evaluation.pass_rate import PassRate

ROUNDING = 1e-9
"""Points by which a change may miss its limit: pass rates are quotients."""


@dataclass(frozen=True)
class Check:
    """One domain against one limit; all numbers in points."""

    domain: str
    kind: Literal["gain", "drop"]
    limit: float
    change: float
    half_width: float
    passed: bool

    def __str__(self) -> str:
        wanted = f"at least {self.limit:+g}" if self.kind == "gain" else f"no less than {-self.limit:+g}"
        return f"{self.domain} {self.change:+.1f} ±{self.half_width:.1f} points ({wanted})"


@dataclass(frozen=True)
class GateVerdict:
    stage: str
    checks: tuple[Check, ...]
    action: Literal["none", "stop", "warn", "back"]
    """What follows: nothing when all checks passed, else what the recipe says."""
    result: str
    """Label of the weights that later stages take when they start from this stage."""
    compared_with: str
    """Label that the changes are against; `best` where each domain has its own."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """One sentence: what was found and what follows."""
        against = "the best so far" if self.compared_with == "best" else self.compared_with
        if self.passed:
            return f"gate of {self.stage} passed against {against}: {_listed(self.checks)}"
        failed = [check for check in self.checks if not check.passed]
        follows = {
            "stop": "the run stops here, as its recipe says",
            "warn": "the run goes on, as its recipe says",
            "back": f"later stages start from {self.result} instead, as its recipe says",
        }[self.action]
        return f"gate of {self.stage} failed against {against}: {_listed(failed)}; {follows}"

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "passed": self.passed,
            "action": self.action,
            "reason": self.reason,
            "result": self.result,
            "compared_with": self.compared_with,
            "checks": [asdict(check) for check in self.checks],
        }


def has_gate(stage: StageConfig) -> bool:
    return stage.gate.min_gain is not None or stage.gate.max_drop is not None


def judge(
    stage: StageConfig, recipe: Recipe, row: Row, parent: Row, earlier: Sequence[Row], fallbacks: Sequence[Row]
) -> GateVerdict:
    """The verdict on a stage that ended with `row`.

    Args:
        parent: row of the weights that the stage started from.
        earlier: every row measured before the stage's end, of which a gate `against: best` takes the best of each
            domain.
        fallbacks: rows with weights that are still there, of which a gate that goes back takes the strongest.
    """
    baseline = parent.scores if stage.gate.against == "parent" else _best_scores([parent, *earlier])
    checks = tuple(_checks(stage, recipe, row.scores, baseline))
    action = "none" if all(check.passed for check in checks) else stage.gate.on_failure
    return GateVerdict(
        stage=stage.name,
        checks=checks,
        action=action,
        result=strongest([parent, *fallbacks]).label if action == "back" else stage.name,
        compared_with=parent.label if stage.gate.against == "parent" else "best",
    )


def strongest(rows: Sequence[Row]) -> Row:
    """The row with the highest mean pass rate over its domains; the earliest among equals."""
    return max(rows, key=lambda row: sum(score.pass_rate for score in row.scores.values()) / len(row.scores))


def _best_scores(rows: Sequence[Row]) -> Scores:
    """The best score of each domain over the rows."""
    best = dict(rows[0].scores)
    for row in rows[1:]:
        best |= {d: score for d, score in row.scores.items() if d not in best or score.pass_rate > best[d].pass_rate}
    return best


def _checks(stage: StageConfig, recipe: Recipe, after: Scores, before: Scores) -> Iterator[Check]:
    """A domain that the recipe was given after the baseline was measured has no change to speak of."""
    measured = after.keys() & before.keys()
    if stage.gate.min_gain is not None:
        for domain in [domain for domain in own_domains(stage) if domain in measured]:
            yield _check(domain, "gain", stage.gate, after[domain], before[domain])
    if stage.gate.max_drop is not None:
        for domain in [domain for domain in other_domains(stage, recipe) if domain in measured]:
            yield _check(domain, "drop", stage.gate, after[domain], before[domain])


def _check(domain: str, kind: Literal["gain", "drop"], gate: GateConfig, after: PassRate, before: PassRate) -> Check:
    change = 100 * (after.pass_rate - before.pass_rate)
    half_width = 100 * math.hypot(after.half_width, before.half_width)
    limit = gate.min_gain if kind == "gain" else gate.max_drop
    assert limit is not None
    least = limit if kind == "gain" else -limit
    slack = half_width if gate.certain else 0.0
    return Check(domain, kind, limit, change, half_width, change + slack >= least - ROUNDING)


def _listed(checks: Sequence[Check]) -> str:
    return "; ".join(map(str, checks))
