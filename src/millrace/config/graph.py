"""The stages of a recipe as a graph: what each one starts from, which teachers it asks for, and what gates measure.

Stages run in the order of the recipe. Each starts from the result of one earlier stage (`from`, the previous one when
absent), so the graph is a tree whose root is the model itself, called `start`. Pure: names in, sentences out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from millrace.config.schema import EvaluateStage, MopdStage, Recipe, SamplingStage, StageConfig

START = "start"
"""Name of what the first stage starts from: the recipe's model."""

_TEACHER = re.compile(r"(best|stage)\(\s*([A-Za-z0-9_-]+)\s*\)")


@dataclass(frozen=True)
class TeacherRule:
    kind: Literal["best", "stage"]
    name: str
    """A domain (`best`) or a stage (`stage`)."""

    def __str__(self) -> str:
        return f"{self.kind}({self.name})"


@dataclass(frozen=True)
class StageGraph:
    parents: Mapping[str, str]
    """Stage -> what it starts from, in the order of the recipe."""

    def lineage(self, stage: str) -> tuple[str, ...]:
        """What a stage's result was built on, the nearest first; the last one is `start`."""
        line = [self.parents[stage]]
        while line[-1] != START:
            line.append(self.parents[line[-1]])
        return tuple(line)

    def before(self, stage: str) -> tuple[str, ...]:
        """Everything that exists when a stage begins, on any branch, `start` first."""
        names = list(self.parents)
        return (START, *names[: names.index(stage)])

    def after(self, stage: str) -> tuple[str, ...]:
        """The stages whose lineage holds this one."""
        return tuple(other for other in self.parents if stage in self.lineage(other))


def stage_graph(stages: Iterable[StageConfig]) -> StageGraph:
    """The graph of stages that `graph_problems` finds nothing wrong with."""
    parents: dict[str, str] = {}
    previous = START
    for stage in stages:
        parents[stage.name] = stage.from_ or previous
        previous = stage.name
    return StageGraph(parents)


def teacher_rule(text: str) -> TeacherRule | None:
    """The rule that a recipe writes as `best(DOMAIN)` or `stage(NAME)`; None when it is neither."""
    match = _TEACHER.fullmatch(text.strip())
    return TeacherRule("best" if match[1] == "best" else "stage", match[2]) if match else None


def own_domains(stage: StageConfig) -> tuple[str, ...]:
    """The domains that a stage is meant to improve."""
    if stage.gate.own is not None:
        return stage.gate.own
    return stage.domains if isinstance(stage, SamplingStage) else ()


def other_domains(stage: StageConfig, recipe: Recipe) -> tuple[str, ...]:
    """The domains that a stage is meant to leave as good as they are."""
    if stage.gate.others is not None:
        return stage.gate.others
    return tuple(domain for domain in recipe.domains if domain not in own_domains(stage))


def graph_problems(recipe: Recipe) -> list[str]:
    """What is wrong with origins, teachers and gates, one sentence each."""
    problems: list[str] = []
    for index, stage in enumerate(recipe.stages):
        problems += _origin(recipe, index)
        problems += _gate(stage, recipe)
        if isinstance(stage, MopdStage):
            problems += _teachers(stage, recipe, index)
    return problems


def _origin(recipe: Recipe, index: int) -> Iterator[str]:
    stage, names = recipe.stages[index], [stage.name for stage in recipe.stages]
    if stage.name == START:
        yield f"stages: the name {START} stands for the model that the run starts from; name the stage otherwise"
    wanted, key = stage.from_, f"stages.{stage.name}.from"
    if wanted is None or wanted == START or wanted in names[:index]:
        return
    if wanted == stage.name:
        yield f"{key} is {wanted}, the stage itself; name an earlier stage, or leave it out to take the previous one"
    elif wanted not in names:
        yield f"{key} is {wanted}, which is not a stage{nearest(wanted, [START, *names])}"
    elif circle := _circle(recipe, stage.name):
        yield (
            f"{key}: the stages start from each other in a circle, {' <- '.join(circle)} (without `from` a stage "
            "starts from the previous one); give one of them another `from`"
        )
    else:
        yield f"{key} is {wanted}, which comes later; put {wanted} before {stage.name}"


def _circle(recipe: Recipe, start: str) -> list[str]:
    """The stages of a circle through `start`, or nothing."""
    named = {stage.name: stage.from_ for stage in recipe.stages}
    previous = {b.name: a.name for a, b in zip(recipe.stages, recipe.stages[1:], strict=False)}
    path, here = [start], start
    while (there := named.get(here) or previous.get(here)) is not None and there not in path:
        path.append(there)
        here = there
    return [*path, start] if there == start else []


def _teachers(stage: MopdStage, recipe: Recipe, index: int) -> Iterator[str]:
    names = [other.name for other in recipe.stages]
    earlier = [START, *names[:index]]
    for domain, text in stage.teachers.items():
        key, rule = f"stages.{stage.name}.teachers.{domain}", teacher_rule(text)
        if rule is None:
            yield f"{key} is {text!r}; write best(DOMAIN) or stage(NAME)"
        elif rule.kind == "best" and rule.name not in recipe.domains:
            yield (
                f"{key} is {rule}, but {rule.name} is not a domain of this recipe, so that no checkpoint is the best "
                f"at it{nearest(rule.name, recipe.domains)}"
            )
        elif rule.kind == "best" or rule.name in earlier:
            continue
        elif rule.name == stage.name:
            yield f"{key} is {rule}, the stage itself; a teacher is an earlier stage, or stage({START})"
        elif rule.name in names:
            yield f"{key} is {rule}, which does not exist yet when {stage.name} begins; put {rule.name} before it"
        else:
            yield f"{key} is {rule}, but {rule.name} is not a stage{nearest(rule.name, earlier)}"


def _gate(stage: StageConfig, recipe: Recipe) -> Iterator[str]:
    gate, key = stage.gate, f"stages.{stage.name}.gate"
    for field, domains in (("own", gate.own), ("others", gate.others)):
        for domain in domains or ():
            if domain not in recipe.domains:
                yield (
                    f"{key}.{field} names {domain}, which no held-out set measures{nearest(domain, recipe.domains)}; "
                    "a gate speaks about domains of the recipe"
                )
    own = own_domains(stage)
    for both in dict.fromkeys(domain for domain in gate.others or () if domain in own):
        place = f"{key}.own" if gate.own is not None else "the stage's own domains"
        yield f"{key}.others names {both}, which is among {place}; min_gain speaks about those, so leave it out here"
    yield from _limits(stage, recipe, key)


def _limits(stage: StageConfig, recipe: Recipe, key: str) -> Iterator[str]:
    """The two limits of a gate have something to speak about, and the lists of domains have a limit."""
    gate = stage.gate
    if gate.min_gain is not None and not own_domains(stage):
        yield f"{key}.min_gain is {gate.min_gain:g}, but the stage has no domains of its own; name some in {key}.own"
    if gate.max_drop is not None and not other_domains(stage, recipe):
        yield f"{key}.max_drop is {gate.max_drop:g}, but there is no other domain to measure; leave it out"
    if gate.own and gate.min_gain is None and gate.max_drop is None:
        yield f"{key}.own names domains, but there is neither min_gain nor max_drop; give one, or leave own out"
    if gate.others and gate.max_drop is None:
        yield f"{key}.others names domains, but there is no max_drop for them; give one, or leave others out"
    limited = gate.min_gain is not None or gate.max_drop is not None
    if isinstance(stage, EvaluateStage) and limited and gate.against == "parent":
        yield (
            f"{key} compares the stage with its parent, but an evaluate stage has its parent's weights; "
            f"set {key}.against to best, or put the gate at a stage that trains"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what a misspelt name may have meant."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else f" (there are: {', '.join(names) or 'none'})"
