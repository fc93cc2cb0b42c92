"""Which checkpoint teaches a domain, by the rules of the recipe. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millrace.cascade.history import History, Row
from millrace.config.graph import START, StageGraph, TeacherRule, teacher_rule
from millrace.config.schema import MopdStage
from millrace.errors import MillraceError
from millrace.observe.entries import stage_of


class NoTeacher(MillraceError):
    """No checkpoint fulfils a teacher's rule."""


def choose_teachers(stage: MopdStage, history: History, graph: StageGraph) -> dict[str, str]:
    """The label of each domain's teacher when the stage begins.

    `best(DOMAIN)` is the strongest checkpoint of the stages before it, on any branch, by held-out pass rate
    (arXiv 2603.19220, section 4.4), the earliest among equals; `stage(NAME)` is that stage's result. Raises NoTeacher.
    """
    before = graph.before(stage.name)
    rows = [row for row in loadable(history.rows.values()) if stage_of(row.label) in before]
    return {domain: _choose(stage, domain, _rule(text), history, rows) for domain, text in stage.teachers.items()}


def _choose(stage: MopdStage, domain: str, rule: TeacherRule, history: History, rows: Sequence[Row]) -> str:
    if rule.kind == "stage":
        return START if rule.name == START else history.result(rule.name)
    candidates = [row for row in rows if rule.name in row.scores]
    if not candidates:
        raise NoTeacher(
            f"stages.{stage.name}.teachers.{domain} is {rule}, but no checkpoint of this run has been measured on "
            f"{rule.name}; name one by stage(NAME)"
        )
    return max(candidates, key=lambda row: row.scores[rule.name].pass_rate).label


def loadable(rows: Iterable[Row]) -> list[Row]:
    """The rows whose weights are still there: of the model itself, and of checkpoints that were kept."""
    return [row for row in rows if row.label == START or row.checkpoint is not None]


def _rule(text: str) -> TeacherRule:
    rule = teacher_rule(text)
    assert rule is not None, "the recipe's rules refuse anything else"
    return rule
