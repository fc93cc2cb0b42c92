from pathlib import Path

import pytest

from millrace.config.graph import (
    StageGraph,
    TeacherRule,
    graph_problems,
    other_domains,
    own_domains,
    stage_graph,
    teacher_rule,
)
from millrace.config.loading import load_recipe
from millrace.config.rules import check_recipe
from millrace.config.schema import Recipe


def load(file: Path, *overrides: str) -> Recipe:
    return load_recipe(file, overrides)


def graph(file: Path, *overrides: str) -> StageGraph:
    return stage_graph(load(file, *overrides).stages)


def problems(file: Path, *overrides: str) -> list[str]:
    return graph_problems(load(file, *overrides))


def stages(*entries: str) -> str:
    """An override that puts SFT stages in place: `name`, or `name<parent`."""
    named = (entry.partition("<") for entry in entries)
    texts = [f"{{type: sft, name: {n}, data: [sft.jsonl], steps: 1{f', from: {p}' if p else ''}}}" for n, _, p in named]
    return f"stages=[{', '.join(texts)}]"


def test_a_sound_cascade_breaks_no_rule(cascade_file: Path) -> None:
    assert check_recipe(load(cascade_file)) == []


def test_a_stage_starts_from_the_previous_one_unless_it_says_otherwise(cascade_file: Path) -> None:
    assert dict(graph(cascade_file).parents) == {
        "warm": "start",
        "climb": "warm",
        "prefer": "warm",
        "distil": "climb",
        "look": "distil",
    }
    assert graph(cascade_file, "stages.prefer.from=start").parents["prefer"] == "start"


def test_the_graph_tells_what_was_built_on_what(cascade_file: Path) -> None:
    tree = graph(cascade_file)
    assert tree.lineage("look") == ("distil", "climb", "warm", "start")
    assert tree.lineage("warm") == ("start",)
    assert tree.before("distil") == ("start", "warm", "climb", "prefer")
    assert tree.before("warm") == ("start",)
    assert tree.after("warm") == ("climb", "prefer", "distil", "look")
    assert tree.after("prefer") == tree.after("look") == ()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("best(math)", TeacherRule("best", "math")),
        (" stage( if-rl ) ", TeacherRule("stage", "if-rl")),
        ("stage(start)", TeacherRule("stage", "start")),
        ("best()", None),
        ("best(a, b)", None),
        ("worst(math)", None),
        ("math", None),
        ("best(math", None),
    ],
)
def test_a_teacher_is_the_best_of_a_domain_or_a_named_stage(text: str, rule: TeacherRule | None) -> None:
    assert teacher_rule(text) == rule
    if rule:
        assert teacher_rule(str(rule)) == rule


def test_a_stage_speaks_for_its_domains_and_a_gate_may_say_otherwise(cascade_file: Path) -> None:
    recipe = load(cascade_file)
    by_name = {stage.name: stage for stage in recipe.stages}
    assert own_domains(by_name["climb"]) == ("math",)
    assert other_domains(by_name["climb"], recipe) == ("format", "chat")
    assert own_domains(by_name["distil"]) == ("math", "chat", "format")
    assert own_domains(by_name["warm"]) == own_domains(by_name["look"]) == ()
    assert other_domains(by_name["warm"], recipe) == ("math", "format", "chat")
    said = load(cascade_file, "stages.climb.gate={own: [format], others: [chat], min_gain: 1, max_drop: 1}")
    assert own_domains(said.stages[1]) == ("format",) and other_domains(said.stages[1], said) == ("chat",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.climb.from=climb", "stages.climb.from is climb, the stage itself; name an earlier stage, or leave it"),
        ("stages.climb.from=warn", "stages.climb.from is warn, which is not a stage (did you mean warm?)"),
        ("stages.climb.from=zz", "is not a stage (there are: start, warm, climb, prefer, distil, look)"),
        (stages("start", "b"), "stages: the name start stands for the model that the run starts from; name the stage"),
        (stages("a<c", "b", "c<start"), "stages.a.from is c, which comes later; put c before a"),
        (stages("a<b", "b<start"), "stages.a.from is b, which comes later; put b before a"),
        (stages("a<b", "b<a"), "stages.a.from: the stages start from each other in a circle, a <- b <- a (without"),
        (stages("a<c", "b", "c"), "a <- c <- b <- a (without `from` a stage starts from the previous one)"),
        (stages("a", "b<d", "c", "d<c"), "b <- d <- c <- b"),
    ],
)
def test_an_origin_that_cannot_be_is_one_sentence(cascade_file: Path, override: str, message: str) -> None:
    (problem,) = problems(cascade_file, override)
    assert message in problem


def test_a_circle_elsewhere_is_not_blamed_on_a_stage_that_leads_into_it(cascade_file: Path) -> None:
    first, second = problems(cascade_file, stages("a<b", "b<c", "c<b"))
    assert first == "stages.a.from is b, which comes later; put b before a"
    assert "b <- c <- b" in second


def test_any_order_of_stages_that_names_earlier_ones_is_fine(cascade_file: Path) -> None:
    for order in (stages("a", "b", "c<a", "d<a"), stages("a<start", "b<start", "c<start"), stages("a", "b<a", "c<b")):
        assert problems(cascade_file, order) == []


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("math", "stages.distil.teachers.math is 'math'; write best(DOMAIN) or stage(NAME)"),
        ("best(maths)", "is best(maths), but maths is not a domain of this recipe, so that no checkpoint is the best"),
        ("best(maths)", "(did you mean math?)"),
        ("best(climb)", "but climb is not a domain"),
        ("stage(distil)", "is stage(distil), the stage itself; a teacher is an earlier stage, or stage(start)"),
        ("stage(look)", "is stage(look), which does not exist yet when distil begins; put look before it"),
        ("stage(clim)", "is stage(clim), but clim is not a stage (did you mean climb?)"),
        ("stage(math)", "but math is not a stage (there are: start, warm, climb, prefer)"),
    ],
)
def test_a_teacher_that_does_not_exist_in_time_is_one_sentence(cascade_file: Path, rule: str, message: str) -> None:
    (problem,) = problems(cascade_file, f"stages.distil.teachers.math={rule}")
    assert problem.startswith("stages.distil.teachers.math is ") and message in problem


@pytest.mark.parametrize("rule", ["best(chat)", "stage(start)", "stage(warm)", "stage(climb)", "stage(prefer)"])
def test_every_earlier_checkpoint_of_any_branch_may_teach(cascade_file: Path, rule: str) -> None:
    assert problems(cascade_file, f"stages.distil.teachers.math={rule}") == []


@pytest.mark.parametrize(
    ("stage", "gate", "message"),
    [
        (
            "climb",
            "{own: [maths], min_gain: 0}",
            ".own names maths, which no held-out set measures (did you mean math?)",
        ),
        (
            "climb",
            "{others: [code], max_drop: 1}",
            ".others names code, which no held-out set measures (there are: math",
        ),
        (
            "climb",
            "{own: [format], others: [format], max_drop: 1}",
            ".others names format, which is among stages.climb.gate.own; min_gain speaks about those",
        ),
        ("climb", "{others: [math], max_drop: 1}", ".others names math, which is among the stage's own domains"),
        ("warm", "{min_gain: 1}", ".min_gain is 1, but the stage has no domains of its own; name some in"),
        ("distil", "{max_drop: 1}", ".max_drop is 1, but there is no other domain to measure; leave it out"),
        ("climb", "{others: [], max_drop: 1}", ".max_drop is 1, but there is no other domain"),
        ("warm", "{own: [math]}", ".own names domains, but there is neither min_gain nor max_drop; give one, or leave"),
        ("climb", "{others: [chat]}", ".others names domains, but there is no max_drop for them; give one, or leave"),
        ("climb", "{others: [chat], min_gain: 1}", ".others names domains, but there is no max_drop"),
        (
            "look",
            "{max_drop: 1}",
            " compares the stage with its parent, but an evaluate stage has its parent's weights",
        ),
    ],
)
def test_a_gate_that_cannot_decide_is_one_sentence(cascade_file: Path, stage: str, gate: str, message: str) -> None:
    (problem,) = problems(cascade_file, f"stages.{stage}.gate={gate}")
    assert problem.startswith(f"stages.{stage}.gate") and message in problem


@pytest.mark.parametrize(
    ("stage", "gate"),
    [
        ("warm", "{max_drop: 1}"),
        ("warm", "{own: [math], min_gain: 1, max_drop: 5}"),
        ("climb", "{own: [format], max_drop: 1}"),
        ("climb", "{min_gain: -1, certain: true, on_failure: back, against: best}"),
        ("look", "{max_drop: 1, against: best}"),
        ("look", "{own: [math], min_gain: 0, against: best}"),
    ],
)
def test_gates_that_can_decide_are_accepted(cascade_file: Path, stage: str, gate: str) -> None:
    assert problems(cascade_file, f"stages.{stage}.gate={gate}") == []


def test_a_gate_without_any_domain_says_so(cascade_file: Path) -> None:
    found = problems(cascade_file, "domains={}", stages("a"), "stages.a.gate.max_drop=1")
    assert found == ["stages.a.gate.max_drop is 1, but there is no other domain to measure; leave it out"]
