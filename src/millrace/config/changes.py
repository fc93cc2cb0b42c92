"""What a changed recipe means for a run that has begun: which changes it can still take, and which touch what is done.

Pure: two recipes and the names of the stages that have begun in, one line for each difference out. Stages are matched
by their names, wherever they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from millrace.config.graph import START, stage_graph
from millrace.config.loading import written
from millrace.config.schema import CurriculumConfig, MopdStage, Recipe, SamplingStage, StageConfig

Effect = Literal["free", "future", "past"]

FREE_TO_CHANGE = (
    "name",
    "run_dir",
    "trainer.threads_per_rank",
    "trainer.collective_timeout_s",
    "checkpoint",
    "fleet.addresses",
    "fleet.start_timeout_s",
    "fleet.request_timeout_s",
    "fleet.heartbeat_s",
    "fleet.max_restarts",
    "observe",
)
"""Keys, or sections with all their keys, that change nothing in what is computed."""

_NEXT_TIME = {
    "evaluation.every": "taken from the next step on",
    "evaluation.keep": "taken from the next evaluation on",
    "export": "taken at the end of the run",
}
"""Keys that say what is done at later moments alone."""

ALIGNED = 48
"""Columns of values up to which lines are aligned; a longer one, such as a list of files, shifts its own line alone."""


class _Absent:
    """The value of a key that a recipe does not have."""

    def __str__(self) -> str:
        return "-"


ABSENT = _Absent()


@dataclass(frozen=True)
class Change:
    key: str
    """Dotted, a stage by its name: stages.rl-math.optimizer.lr."""
    before: Any
    after: Any
    """Old and new value; ABSENT where a recipe does not have the key."""
    effect: Effect
    """free: nothing that is computed changes. future: what has not begun takes it. past: it touches what is done."""
    reason: str
    """Why, and for a past change the way to have it."""


def explain_changes(before: Recipe, after: Recipe, begun: Sequence[str], finished: Sequence[str] = ()) -> list[Change]:
    """Every difference between the recipe of a run and the one it is to go on with, in the recipe's order.

    `begun`: stages in progress or through, and `start` when the model itself was measured; `finished`: those through.
    """
    past = _Past(before, tuple(dict.fromkeys([*begun, *finished])), tuple(finished))
    changes: list[Change] = []
    old, new = written(before), written(after)
    for section in old:
        if section == "stages":
            changes += _stage_changes(before, after, past)
        elif section == "domains":
            changes += _domain_changes(old["domains"], new["domains"], past)
        else:
            for key, was, now in _differences(old[section], new[section], section):
                changes.append(Change(key, was, now, *past.of_everything(key)))
    return changes


def change_lines(changes: Sequence[Change]) -> list[str]:
    """One aligned line a change: key, old and new value, effect and reason."""
    values = [f"{_said(change.before)} -> {_said(change.after)}" for change in changes]
    key_width = max((len(change.key) for change in changes), default=0)
    value_width = max((len(text) for text in values if len(text) <= ALIGNED), default=0)
    return [
        f"{change.key:{key_width}}  {text:{value_width}}  {change.effect:6}  {change.reason}"
        for change, text in zip(changes, values, strict=True)
    ]


def _differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys below `key` with the values in which two written sections differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            yield from _differences(before.get(name, ABSENT), after.get(name, ABSENT), f"{key}.{name}")
    elif before != after:
        yield key, before, after


def computing_keys(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The dotted keys, with their values, on which the results of one stage depend."""
    keys = {key: value for key, value in _leaves(written(recipe), "") if not (_is_free(key) or key in _NEXT_TIME)}
    settings = [{**written(other), "gate": None} for other in recipe.stages if other.name == stage]
    return {**keys, "stages": settings}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, item in value.items():
        yield from _leaves(item, f"{key}.{name}" if key else name)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)


@dataclass(frozen=True)
class _Past:
    """What a run has done, and what a change of each kind means for it."""

    recipe: Recipe
    begun: tuple[str, ...]
    finished: tuple[str, ...]

    def of_everything(self, key: str) -> tuple[Effect, str]:
        """A key that all stages depend on."""
        if _is_free(key):
            return "free", "changes nothing that is computed"
        if key in _NEXT_TIME:
            return "future", _NEXT_TIME[key]
        if key.startswith("evaluation."):
            return self.of_measurements()
        if not self.begun:
            return "future", "nothing has begun"
        return "past", f"{self._done()} with the old value; set another run_dir to start afresh with the new one"

    def of_stage(self, name: str) -> tuple[Effect, str]:
        """A key of one stage."""
        again = f"`millrace run RECIPE --from {name}` runs it again with the new value"
        if name in self.finished:
            return "past", f"stage {name} is finished and will not run again; {again}"
        if name in self.begun:
            return "past", f"stage {name} has begun with the old value; {again}"
        return "future", f"stage {name} has not begun"

    def of_gate(self, name: str) -> tuple[Effect, str]:
        """A key of a stage's gate: its verdict is found anew, unless later stages started from the one before."""
        users = [*stage_graph(self.recipe.stages).after(name), *_taught_by_it(name, self.recipe)]
        started = [other for other in users if other in self.begun]
        if not started:
            return "future", f"stage {name} is judged by it when it is through"
        return "past", (
            f"{started[0]} started from the old verdict; `millrace run RECIPE --from {started[0]}` runs it again"
        )

    def of_measurements(self) -> tuple[Effect, str]:
        """A key by which held-out pass rates are measured."""
        if not self.begun:
            return "future", "nothing has been measured"
        return "past", "pass rates on record were measured the old way and would not compare with later ones"

    def of_users(self, names: Sequence[str]) -> tuple[Effect, str]:
        """A key that only the stages `names` depend on."""
        touched = [name for name in names if name in self.begun]
        return self.of_stage(touched[0]) if touched else ("future", "no stage that has begun uses it")

    def _done(self) -> str:
        stages = [name for name in self.begun if name != START]
        return f"{', '.join(stages)} ran" if stages else "the model was measured"


def _taught_by_it(name: str, recipe: Recipe) -> list[str]:
    """The later stages that may have a result of this one for a teacher."""
    names = [stage.name for stage in recipe.stages]
    behind = recipe.stages[names.index(name) + 1 :] if name in names else ()
    return [stage.name for stage in behind if isinstance(stage, MopdStage)]


def _stage_changes(before: Recipe, after: Recipe, past: _Past) -> Iterator[Change]:
    old, new = _by_name(before), _by_name(after)
    yield from _order_changes([name for name in old if name in new], [name for name in new if name in old], past)
    for name in dict.fromkeys([*new, *old]):
        key = f"stages.{name}"
        if name not in new:
            yield Change(key, old[name].type, ABSENT, *_removed(name, past))
        elif name not in old:
            yield Change(key, ABSENT, new[name].type, *_added(name, list(new), past))
        else:
            changed_type = old[name].type != new[name].type
            for at, was, now in _differences(_settings(name, before), _settings(name, after), key):
                # Keys of one type alone say nothing beside the type.
                if not (changed_type and (was is ABSENT or now is ABSENT)):
                    of_gate = at.startswith(f"{key}.gate.")
                    yield Change(at, was, now, *(past.of_gate(name) if of_gate else past.of_stage(name)))


def _by_name(recipe: Recipe) -> dict[str, StageConfig]:
    return {stage.name: stage for stage in recipe.stages}


def _settings(name: str, recipe: Recipe) -> dict[str, Any]:
    """A stage's written keys, with the stage that it starts from in any case."""
    return {**written(_by_name(recipe)[name]), "from": stage_graph(recipe.stages).parents[name]}


def _order_changes(before: list[str], after: list[str], past: _Past) -> Iterator[Change]:
    if before == after:
        return
    last = max((place for place, name in enumerate(before) if name in past.begun), default=-1)
    if before[: last + 1] == after[: last + 1]:
        effect: tuple[Effect, str] = ("future", "the stages that change places have not begun")
    else:
        effect = ("past", f"{before[last]} has begun, and stages run in order; leave those up to it where they were")
    yield Change("stages", before, after, *effect)


def _removed(name: str, past: _Past) -> tuple[Effect, str]:
    if name not in past.begun:
        return "future", f"stage {name} has not begun, and will not"
    state = "is finished" if name in past.finished else "has begun"
    return "past", f"stage {name} {state}, and later stages may build on it; keep it, or set another run_dir"


def _added(name: str, order: list[str], past: _Past) -> tuple[Effect, str]:
    behind = [other for other in order[order.index(name) :] if other in past.begun]
    if not behind:
        return "future", f"stage {name} will run in its turn"
    return "past", (
        f"{behind[0]}, which has begun, comes behind it; put {name} behind {behind[-1]}, or "
        f"`millrace run RECIPE --from {name}` runs it and all behind it"
    )


def _domain_changes(before: Mapping[str, Any], after: Mapping[str, Any], past: _Past) -> Iterator[Change]:
    for name in dict.fromkeys([*before, *after]):
        key = f"domains.{name}"
        if name not in after:
            yield Change(key, before[name]["environment"], ABSENT, *past.of_users(_users(name, past.recipe)))
        elif name not in before:
            measured = "measured from the next evaluation on" if past.begun else "nothing has begun"
            yield Change(key, ABSENT, after[name]["environment"], "future", measured)
        else:
            for at, was, now in _differences(before[name], after[name], key):
                yield Change(at, was, now, *_domain_effect(name, at.removeprefix(f"{key}."), past))


def _domain_effect(name: str, field: str, past: _Past) -> tuple[Effect, str]:
    if field == "train":
        return past.of_users(_users(name, past.recipe))
    if field == "pass_rates":
        return past.of_users(_users(name, past.recipe, by_pass_rate=True))
    return past.of_measurements()


def _users(domain: str, recipe: Recipe, *, by_pass_rate: bool = False) -> list[str]:
    """The stages that draw training prompts of a domain, or those that look at their pass rates."""
    drawing = [stage for stage in recipe.stages if isinstance(stage, SamplingStage) and domain in stage.domains]
    return [stage.name for stage in drawing if not by_pass_rate or stage.curriculum != CurriculumConfig()]


def _said(value: Any) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_said(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_said, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
