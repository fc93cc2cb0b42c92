"""What a recipe with a judge must fulfil."""

from pathlib import Path

import pytest

from millrace.config.loading import load_recipe
from millrace.config.rules import check_recipe

JUDGED = """\
extends: recipe.yaml
domains:
  chat: {environment: genrm, train: chat.jsonl, held_out: asked.jsonl, judge: j}
judges:
  j: {model: base, max_tokens: 64, engine: {max_model_len: 256}}
  unused: {url: "http://node7:8000/v1"}
stages:
  - {type: rlhf, name: please, domains: [chat], steps: 2, sampling: {max_response_tokens: 64}}
"""


@pytest.fixture
def judged(recipe_file: Path) -> Path:
    (recipe_file.parent / "chat.jsonl").write_text('{"prompt": "hello"}\n')
    (recipe_file.parent / "asked.jsonl").write_text('{"prompt": "hello", "reference": "hi"}\n')
    file = recipe_file.with_name("judged.yaml")
    file.write_text(JUDGED)
    return file


def check(file: Path, *overrides: str) -> list[str]:
    return check_recipe(load_recipe(file, overrides))


def test_a_judged_recipe_is_sound_and_takes_kl_to_the_stages_start(judged: Path) -> None:
    assert check(judged) == []
    assert check(judged, "judges.spare={model: nowhere, max_tokens: 64}") == [], "it is never started"
    (stage,) = load_recipe(judged, ()).stages
    assert (stage.kl.coefficient, stage.kl.estimator) == (0.03, "k3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("domains.chat.judge=k", "domains.chat.judge is k, which is not among the judges"),
        ("domains.chat.judge=null", "domains.chat.judge is required"),
        ("domains.math.judge=j", "domains.math.judge is j, but math asks no judge; leave it out"),
        ("judges.j.url='http://a/v1'", "judges.j needs exactly one of model and url, but both are given"),
        ("judges.unused.url=a", "judges.unused.url is 'a', which is not a URL"),
        ("judges.j.model=nowhere", "judges.j.model: the folder"),
        ("judges.j.max_tokens=256", "judges.j.max_tokens is 256, which leaves no room for two answers"),
        ("judges.j.engine.engines=0", "judges.j.engine.engines is 0, which starts no judge"),
        ("judges.j.concurrency=0", "judges.j.concurrency is 0; it must be at least 1"),
        ("stages.please.overlong=zero_reward", "stages.please.overlong is zero_reward, but an answer that was cut"),
        ("stages.please.domains=[math]", "scores each answer alone; train it in a stage of type: rl"),
        ("judges={'a/b': {url: 'http://a/v1'}, j: {url: 'http://a/v1'}}", "judges: the name 'a/b' becomes part"),
    ],
)
def test_what_is_wrong_with_a_judge_is_said_before_anything_starts(judged: Path, override: str, message: str) -> None:
    found = check(judged, override)
    assert any(message in problem for problem in found), found


def test_a_verdict_and_its_two_answers_fit_into_the_judge(judged: Path) -> None:
    assert check(judged, "judges.j.engine.max_model_len=193") == []
    (problem,) = check(judged, "judges.j.engine.max_model_len=192")
    assert problem.startswith(
        "judges.j.engine.max_model_len is 192, but a verdict of max_tokens 64 about 2 x "
        "stages.please.sampling.max_response_tokens 64 takes up to 192 tokens"
    )


def test_a_verdict_and_a_held_out_answer_fit_into_the_judge(judged: Path) -> None:
    (problem,) = check(judged, "evaluation.sampling.max_response_tokens=200")
    assert "about 1 x evaluation.sampling.max_response_tokens 200 takes up to 264 tokens" in problem


def test_a_judge_elsewhere_has_the_room_that_it_has(judged: Path) -> None:
    assert check(judged, "judges.j={url: 'http://a/v1', engine: {max_model_len: 1}}") == []


def test_held_out_rows_need_a_reference_and_training_rows_do_not(judged: Path) -> None:
    (judged.parent / "asked.jsonl").write_text('{"prompt": "hello"}\n')
    assert len(check(judged)) == 1 and "asked.jsonl:1 has no field 'reference'" in check(judged)[0]


def test_only_the_judges_that_a_genrm_domain_names_are_used(judged: Path) -> None:
    assert list(load_recipe(judged, ()).judges_used) == ["j"]


def test_a_question_over_documents_is_judged_and_trained_alone(judged: Path) -> None:
    (judged.parent / "long.jsonl").write_text('{"prompt": "hello", "answer": "hi"}\n')
    (judged.parent / "long-held.jsonl").write_text('{"prompt": "hello", "answer": "hi"}\n')
    domain = "domains.long={environment: long_context, train: long.jsonl, held_out: long-held.jsonl, judge: j}"
    stage = "stages=[{type: rl, name: read, domains: [long], steps: 2, sampling: {max_response_tokens: 64}}]"
    assert check(judged, domain, stage) == []
    assert set(load_recipe(judged, (domain, "domains.chat.judge=unused")).judges_used) == {"j", "unused"}
    (problem,) = check(judged, domain.replace(", judge: j", ""), stage)
    assert problem == "domains.long.judge is required: the entry of `judges` that judges the answers"
    (problem,) = check(judged, domain, stage, "judges.j.engine.max_model_len=128")
    assert "about 1 x stages.read.sampling.max_response_tokens 64 takes up to 128 tokens" in problem
