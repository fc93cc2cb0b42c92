import dataclasses

import pytest

from millrace.config.changes import ABSENT, Change, change_lines, explain_changes
from millrace.config.schema import (
    CurriculumConfig,
    DomainConfig,
    EvaluationConfig,
    FleetConfig,
    GateConfig,
    JudgeConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    RlStage,
    SftStage,
    TrainerConfig,
)

SFT = SftStage(name="sft", data=("a.jsonl",), steps=10)
MATH = RlStage(name="rl-math", domains=("math",), steps=5)
IF = RlStage(name="rl-if", domains=("if",), steps=5)


def domain(environment="math", **settings) -> DomainConfig:
    return DomainConfig(environment=environment, train="train.jsonl", held_out="held.jsonl", **settings)


RECIPE = Recipe(
    name="trial",
    run_dir="runs/trial",
    model=ModelConfig(path="base"),
    domains={"math": domain(), "if": domain("instruction_following")},
    stages=(SFT, MATH, IF),
)


def changed(**settings) -> Recipe:
    return dataclasses.replace(RECIPE, **settings)


def only(after: Recipe, begun=("start", "sft", "rl-math"), finished=("sft",), before: Recipe = RECIPE) -> Change:
    (change,) = explain_changes(before, after, begun, finished)
    return change


def with_stages(*stages) -> Recipe:
    return changed(stages=stages)


def test_equal_recipes_have_nothing_to_explain() -> None:
    assert explain_changes(RECIPE, changed(), ["sft"], []) == []
    assert change_lines([]) == []
    lines = change_lines([Change("a", 1, 2, "free", "why"), Change("b", "x" * 60, "y", "free", "why")])
    assert lines[0] == "a  1 -> 2  free    why", "a long value shifts its own line alone"
    assert lines[1] == f"b  {'x' * 60} -> y  free    why"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"name": "other"}, "name"),
        ({"run_dir": "elsewhere"}, "run_dir"),
        ({"trainer": TrainerConfig(threads_per_rank=3)}, "trainer.threads_per_rank"),
        ({"trainer": TrainerConfig(collective_timeout_s=1)}, "trainer.collective_timeout_s"),
        ({"fleet": FleetConfig(start_timeout_s=900)}, "fleet.start_timeout_s"),
    ],
)
def test_what_computes_nothing_is_free_at_any_time(settings: dict, key: str) -> None:
    change = only(changed(**settings))
    assert (change.key, change.effect, change.reason) == (key, "free", "changes nothing that is computed")


def test_the_settings_of_a_stage_depend_on_how_far_it_is() -> None:
    hot = OptimizerConfig(lr=1e-4)
    finished = only(with_stages(dataclasses.replace(SFT, optimizer=hot), MATH, IF))
    assert finished == Change(
        "stages.sft.optimizer.lr",
        3e-6,
        1e-4,
        "past",
        "stage sft is finished and will not run again; `millrace run RECIPE --from sft` runs it again with the new "
        "value",
    )
    begun = only(with_stages(SFT, dataclasses.replace(MATH, optimizer=hot), IF))
    assert begun.effect == "past" and begun.reason.startswith(
        "stage rl-math has begun with the old value; `millrace run"
    )
    future = only(with_stages(SFT, MATH, dataclasses.replace(IF, optimizer=hot)))
    assert (future.key, future.effect) == ("stages.rl-if.optimizer.lr", "future")
    assert future.reason == "stage rl-if has not begun"


def test_before_anything_has_begun_everything_is_future() -> None:
    after = changed(
        seed=9,
        model=ModelConfig(path="other"),
        parallel=ParallelConfig(tp=2),
        domains={"math": domain(verify_timeout_s=1), "if": RECIPE.domains["if"]},
        evaluation=EvaluationConfig(samples=4),
        stages=(dataclasses.replace(SFT, steps=3), MATH, IF),
    )
    changes = explain_changes(RECIPE, after, [], [])
    assert [change.key for change in changes] == [
        "seed",
        "model.path",
        "parallel.tp",
        "domains.math.verify_timeout_s",
        "evaluation.samples",
        "stages.sft.steps",
    ]
    assert {change.effect for change in changes} == {"future"}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"seed": 9}, "seed"),
        ({"model": ModelConfig(path="other")}, "model.path"),
        ({"parallel": ParallelConfig(dp=2)}, "parallel.dp"),
        ({"trainer": TrainerConfig(recompute="full")}, "trainer.recompute"),
        ({"fleet": FleetConfig(dtype="float32")}, "fleet.dtype"),
        ({"judges": {"j": JudgeConfig(url="http://x")}}, "judges.j"),
    ],
)
def test_what_all_stages_depend_on_is_past_once_one_has_begun(settings: dict, key: str) -> None:
    change = only(changed(**settings))
    assert (change.key, change.effect) == (key, "past")
    assert change.reason == "sft, rl-math ran with the old value; set another run_dir to start afresh with the new one"
    measured = only(changed(**settings), begun=("start",), finished=())
    assert measured.effect == "past" and measured.reason.startswith("the model was measured with the old value")


def test_a_measured_matrix_holds_on_to_how_it_was_measured() -> None:
    for settings in (
        {"evaluation": EvaluationConfig(samples=4)},
        {"domains": {**RECIPE.domains, "math": domain(system_prompt="Think.")}},
    ):
        assert only(changed(**settings)).effect == "past"
        assert "would not compare" in only(changed(**settings)).reason
    assert only(changed(evaluation=EvaluationConfig(every=5))).effect == "future"
    assert only(changed(export=False)).reason == "taken at the end of the run"


def test_training_data_concern_the_stages_that_draw_them() -> None:
    def with_train(name: str) -> Recipe:
        return changed(domains={**RECIPE.domains, name: dataclasses.replace(RECIPE.domains[name], train="new.jsonl")})

    assert only(with_train("if")).effect == "future"
    touched = only(with_train("math"))
    assert touched.effect == "past" and touched.reason.startswith("stage rl-math has begun")


def test_pass_rates_concern_the_stages_with_a_curriculum() -> None:
    rated = {**RECIPE.domains, "math": domain(pass_rates="rates.jsonl")}
    assert only(changed(domains=rated)).effect == "future"
    picky = dataclasses.replace(MATH, curriculum=CurriculumConfig(above=0))
    before = with_stages(SFT, picky, IF)
    assert only(dataclasses.replace(before, domains=rated), before=before).effect == "past"


def test_domains_that_come_and_go() -> None:
    more = only(changed(domains={**RECIPE.domains, "code": domain("mcqa")}))
    assert more == Change("domains.code", ABSENT, "mcqa", "future", "measured from the next evaluation on")
    fewer = with_stages(SFT, MATH)
    without_if = dataclasses.replace(fewer, domains={"math": RECIPE.domains["math"]})
    assert only(without_if, before=fewer).effect == "future"
    without_math = dataclasses.replace(RECIPE, domains={"if": RECIPE.domains["if"]})
    assert only(without_math).effect == "past"


def test_a_stage_that_is_added_behind_what_has_begun_runs_in_its_turn() -> None:
    new = SftStage(name="polish", data=("b.jsonl",), steps=1)
    assert only(with_stages(SFT, MATH, IF, new)) == Change(
        "stages.polish", ABSENT, "sft", "future", "stage polish will run in its turn"
    )


def test_a_stage_that_is_added_before_what_has_begun_is_past_and_moves_the_origin_of_the_next() -> None:
    new = SftStage(name="polish", data=("b.jsonl",), steps=1)
    added, origin = sorted(
        explain_changes(RECIPE, with_stages(SFT, new, MATH, IF), ["sft", "rl-math"], ["sft"]), key=str
    )
    assert added.key == "stages.polish" and added.effect == "past"
    assert "rl-math, which has begun, comes behind it; put polish behind rl-math, or `millrace run" in added.reason
    assert (origin.key, origin.before, origin.after, origin.effect) == ("stages.rl-math.from", "sft", "polish", "past")


def test_a_stage_can_be_removed_before_it_begins_and_not_after() -> None:
    assert only(with_stages(SFT, MATH)).effect == "future"
    gone, origin = explain_changes(RECIPE, with_stages(SFT, IF), ["sft", "rl-math"], ["sft"])[::-1]
    assert (gone.key, gone.effect) == ("stages.rl-math", "past")
    assert gone.reason.startswith("stage rl-math has begun, and later stages may build on it")
    assert (origin.key, origin.after, origin.effect) == ("stages.rl-if.from", "sft", "future")


def test_an_origin_written_out_that_was_the_same_before_is_no_change() -> None:
    assert explain_changes(RECIPE, with_stages(SFT, dataclasses.replace(MATH, from_="sft"), IF), ["sft"], []) == []


def test_stages_may_change_places_behind_what_has_begun() -> None:
    rooted = [dataclasses.replace(stage, from_="sft") for stage in (MATH, IF)]
    before, after = with_stages(SFT, *rooted), with_stages(SFT, *rooted[::-1])
    change = only(after, begun=("sft",), before=before)
    assert (change.key, change.before, change.after) == (
        "stages",
        ["sft", "rl-math", "rl-if"],
        ["sft", "rl-if", "rl-math"],
    )
    assert change.effect == "future"
    past = only(after, begun=("sft", "rl-math"), before=before)
    assert past.effect == "past" and past.reason.startswith("rl-math has begun, and stages run in order")


def test_another_type_is_one_line_and_not_one_for_each_key_of_the_types() -> None:
    change = only(with_stages(SFT, MATH, SftStage(name="rl-if", data=("c.jsonl",), steps=5)))
    assert (change.key, change.before, change.after, change.effect) == ("stages.rl-if.type", "rl", "sft", "future")


def test_the_lines_are_aligned_and_written_like_a_recipe() -> None:
    after = changed(
        seed=12,
        stages=(SFT, MATH, dataclasses.replace(IF, domains=("if", "math"), dynamic_sampling=True)),
    )
    assert change_lines(explain_changes(RECIPE, after, ["sft"], ["sft"])) == [
        "seed                           1 -> 12             past    sft ran with the old value; set another run_dir to "
        "start afresh with the new one",
        "stages.rl-if.dynamic_sampling  false -> true       future  stage rl-if has not begun",
        "stages.rl-if.domains           [if] -> [if, math]  future  stage rl-if has not begun",
    ]


def test_a_gate_may_change_until_a_later_stage_has_started_from_its_verdict() -> None:
    strict = dataclasses.replace(SFT, gate=GateConfig(max_drop=2.0))
    judged = only(with_stages(strict, MATH, IF), begun=("start", "sft"))
    assert (judged.effect, judged.reason) == ("future", "stage sft is judged by it when it is through")
    started = only(with_stages(strict, MATH, IF))
    assert started.effect == "past" and "rl-math started from the old verdict" in started.reason
