import asyncio
import time

import pytest
from environment_runs import environment, score


def math_row(answer):
    return {"prompt": "What is it?", "answer": answer}


def test_math_rewards_equal_answers_however_they_are_spelt():
    pairs = [
        (math_row("1/2"), r"It is \boxed{\frac{1}{2}}."),
        (math_row(r"\frac12"), r"\boxed{0.5}"),
        (math_row("$x+1$"), r"\boxed{1 + x}"),
        (math_row(r"\boxed{7}"), r"<think>\boxed{8}</think>\boxed{7}"),
        (math_row(7), r"\boxed{7.0}"),
        (math_row("1,000"), r"\boxed{1000}"),
    ]
    assert [reward.value for reward in score(environment("math"), *pairs)] == [1.0] * len(pairs)


def test_math_refuses_wrong_unboxed_and_unfinished_answers_with_a_reason():
    pairs = [
        (math_row("7"), r"\boxed{8}"),
        (math_row("7"), "7"),
        (math_row("7"), r"<think>\boxed{7}"),
        (math_row("7"), r"\boxed{7} or \boxed{8}"),
        (math_row("7"), r"\boxed{" + "7" * 5000 + "}"),
        (math_row("7"), ""),
    ]
    rewards = score(environment("math"), *pairs)
    assert [reward.value for reward in rewards] == [0.0] * len(pairs)
    assert [reward.reason for reward in rewards] == [
        "wrong",
        "no boxed answer",
        "no boxed answer",
        "wrong",
        "boxed answer too long",
        "no boxed answer",
    ]


def test_math_kills_a_comparison_that_never_returns():
    start = time.monotonic()
    hanging, fine = score(
        environment("math", verify_timeout_s=1.0),
        (math_row("9"), r"\boxed{9^{9^{9^9}}}"),
        (math_row("1/2"), r"\boxed{0.5}"),
    )
    assert (hanging.value, hanging.reason) == (0.0, "timeout")
    assert fine.value == 1.0
    assert (hanging.details["verifier_failed"], fine.details["verifier_failed"]) == (1.0, 0.0)
    assert time.monotonic() - start < 15


def test_math_scores_a_thousand_answers_in_seconds():
    pairs = [(math_row(str(i)), rf"\boxed{{{i + i % 2}.0}}") for i in range(1000)]
    start = time.monotonic()
    rewards = score(environment("math"), *pairs)
    assert [reward.value for reward in rewards] == [1.0 - i % 2 for i in range(1000)]
    assert time.monotonic() - start < 30


def test_one_environment_serves_several_event_loops():
    env = environment("math")
    try:
        for _ in range(2):
            assert asyncio.run(env.step(math_row("1/2"), [], r"\boxed{0.5}")).value == 1.0
    finally:
        asyncio.run(env.close())


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "What?", "answer": ""}, "answer must be a number or a non-empty string"),
        ({"prompt": "What?", "answer": None}, "not None"),
        ({"prompt": " ", "answer": "1"}, "prompt is empty"),
        ({"prompt": 3, "answer": "1"}, "prompt must be a string or a non-empty list of messages, not int"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, "message 0 of the prompt must be"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}, "ends with the assistant's own message"),
    ],
)
def test_math_names_what_is_wrong_with_a_row(row, sentence):
    assert sentence in environment("math").validate(row)


def test_prompts_may_be_messages():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    env = environment("math")
    assert env.validate({"prompt": messages, "answer": "1"}) is None
    assert env.reset({"prompt": messages, "answer": "1"}) == messages
    assert env.reset(math_row("1")) == [{"role": "user", "content": "What is it?"}]


IF_ROW = {
    "prompt": "Write.",
    "instruction_id_list": ["punctuation:no_comma", "keywords:existence", "change_case:english_lowercase"],
    "kwargs": [{"keywords": None, "num_words": None}, {"keywords": ["river"], "num_words": None}, None],
}


def test_binary_grading_wants_every_instruction_followed():
    env = environment("instruction_following")
    assert env.validate(IF_ROW) is None
    good, partly, reasoned, empty = score(
        env,
        (IF_ROW, "a river"),
        (IF_ROW, "a River, wide"),
        (IF_ROW, "<think>A, B</think>a river"),
        (IF_ROW, ""),
    )
    assert (good.value, good.reason) == (1.0, "all followed")
    assert partly.value == 0.0 and partly.reason == "missed punctuation:no_comma, change_case:english_lowercase"
    assert partly.details["followed"] == pytest.approx(1 / 3)
    assert reasoned.value == 1.0
    assert empty.value == 0.0 and empty.details["followed"] == 0.0


def test_fraction_grading_gives_the_share_that_is_followed():
    env = environment("instruction_following", grading="fraction")
    rewards = score(env, (IF_ROW, "a river"), (IF_ROW, "a River, wide"), (IF_ROW, "<think>a river"))
    assert [reward.value for reward in rewards] == [1.0, pytest.approx(1 / 3), 0.0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"instruction_id_list": []}, "instruction_id_list must be a non-empty list"),
        ({"kwargs": [{}]}, "kwargs must be a list of 3 objects"),
        ({"kwargs": [{}, "river", {}]}, "the kwargs of keywords:existence must be an object, not 'river'"),
        ({"kwargs": [{}, {}, {}]}, "keywords:existence needs the argument 'keywords'"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_instruction_following_names_what_is_wrong_with_a_row(change, sentence):
    assert sentence in environment("instruction_following").validate({**IF_ROW, **change})
