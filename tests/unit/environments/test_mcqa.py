import time

import pytest
from environment_runs import environment, score

ROW = {
    "prompt": "Which colour has the sky?",
    "options": [{"A": "red"}, {"B": "light blue"}, {"C": "green"}, {"D": None}],
    "expected_answer": "B",
}


def graded(mode):
    return {**ROW, "grading_mode": mode}


def with_pattern(*patterns, **change):
    regex = patterns[0] if len(patterns) == 1 else list(patterns)
    return {**ROW, "template_metadata": {"output_regex": regex}, **change}


STRICT = [
    (r"\boxed{B}", 1),
    (r"\boxed{A} no: \boxed{ (B) }", 1),
    (r"\boxed{\text{B}}", 1),
    (r"\boxed{\text{ \text{B} }}", 1),
    (r"\boxed{B: light blue}", 1),
    (r"\boxed{B) anything}", 1),
    (r"\boxed{B. light blue}", 1),
    (r"\boxed{b}", 0),  # lower case is no option
    (r"\boxed{light blue}", 0),
    (r"\boxed{A or B}", 0),
    (r"\boxed{B light blue}", 0),  # no delimiter
    (r"\boxed{C}", 0),
    (r"\boxed{D}", 0),  # its text is null
    ("B", 0),
    (r"<think>\boxed{B}</think> B it is", 0),
    (r"<think>\boxed{A}</think> \boxed{B}", 1),
    (r"\boxed{B", 0),
    ("", 0),
]


def test_strict_grading_takes_a_letter_from_the_last_box():
    env = environment("mcqa")
    assert env.validate(ROW) is None
    rewards = score(env, *((ROW, answer) for answer, _ in STRICT))
    assert [reward.value for reward in rewards] == [value for _, value in STRICT]


@pytest.mark.parametrize(
    ("mode", "answer", "value"),
    [
        ("lenient_boxed", r"\boxed{B}", 1),
        ("lenient_boxed", r"\boxed{it is Light  blue}", 1),
        ("lenient_boxed", r"\boxed{red or light blue}", 0),
        ("lenient_boxed", "light blue", 0),
        ("lenient_answer_colon", "Answer: b", 1),
        ("lenient_answer_colon", "The ANSWER :  light blue", 1),
        ("lenient_answer_colon", r"Answer: \text{B}", 1),
        ("lenient_answer_colon", "Answer: B because", 0),
        ("lenient_answer_colon", "Answer: A\nAnswer: B", 0),  # the first one counts
        ("lenient_answer_colon_md", "Answer: A\n**Answer:** B", 1),  # the last one counts
        ("lenient_answer_colon_md", "Answer: B because of the air", 1),
        ("lenient_answer_colon_md", "Answer: the letter B", 1),
        ("lenient_answer_colon_md", "Answer: ب", 1),
        ("lenient_answer_colon_md", "Answer: A or B", 0),
        ("lenient_answer_colon_md", "Answer: blue", 0),
    ],
)
def test_lenient_modes_read_more_spellings(mode, answer, value):
    env = environment("mcqa")
    assert env.validate(graded(mode)) is None
    assert score(env, (graded(mode), answer))[0].value == value


def test_a_pattern_of_the_row_comes_first_and_its_last_match_wins():
    selected = r"Option Selected:\s*([A-Za-z])"
    pairs = [
        (with_pattern(selected), "option selected: A. No, Option Selected: b"),
        (with_pattern(selected), r"Option Selected: A \boxed{B}"),
        (with_pattern(selected), r"no such line, but \boxed{B}"),  # then the grading mode
        (with_pattern("(?:final: )(.+)"), "final: Light blue"),
        (with_pattern("never", selected), "Option Selected: B"),
        (with_pattern(selected, options=None), "Option Selected: B"),
    ]
    env = environment("mcqa")
    assert [env.validate(row) for row, _ in pairs] == [None] * len(pairs)
    assert [reward.value for reward in score(env, *pairs)] == [1, 0, 1, 1, 1, 1]


def test_a_pattern_that_backtracks_forever_is_killed():
    start = time.monotonic()
    slow = with_pattern("(?:(?:x+x+)+)(y)")
    env = environment("mcqa", verify_timeout_s=0.5)
    assert env.validate(slow) is None
    hung, fine = score(env, (slow, "x" * 5000), (slow, r"xxy \boxed{B}"))
    assert (hung.value, hung.reason, hung.details["verifier_failed"]) == (0.0, "timeout", 1.0)
    assert fine.reason == "chose Y, not B"
    assert time.monotonic() - start < 15


def test_reasons_name_the_choice():
    rewards = score(environment("mcqa"), (ROW, r"\boxed{B}"), (ROW, r"\boxed{A}"), (ROW, "B"))
    assert [reward.reason for reward in rewards] == ["correct", "chose A, not B", "no answer found"]
    assert [reward.details["answered"] for reward in rewards] == [1.0, 1.0, 0.0]


def test_a_huge_box_is_read_quickly():
    start = time.process_time()
    rewards = score(environment("mcqa"), (ROW, r"\boxed{" + r"\text{" * 100_000 + "B" + "}" * 100_001))
    assert rewards[0].value == 0 and time.process_time() - start < 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"options": None}, "options must be a list of objects from a letter to its text"),
        ({"options": [{"label": "A", "text": "red"}]}, "options must be a list of objects from a letter to its text"),
        ({"options": ["red", "blue"]}, "not ['red', 'blue']"),
        ({"expected_answer": "F"}, "expected_answer 'F' is none of the options A, B, C"),
        ({"expected_answer": 2}, "expected_answer must be the letter of an option, not 2"),
        ({"grading_mode": "loose"}, "grading_mode must be one of strict_single_letter_boxed, lenient_boxed"),
        ({"template_metadata": {"output_regex": "(a"}}, "output_regex '(a' is not a regular expression: missing )"),
        ({"template_metadata": {"output_regex": "(a)(b)"}}, "output_regex '(a)(b)' has 2 groups; one must capture"),
        ({"template_metadata": {"output_regex": "(" * 5000 + ")" * 5000}}, "is not a regular expression"),
        ({"template_metadata": {"output_regex": [7]}}, "must be a regular expression or a list of them, not [7]"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_mcqa_names_what_is_wrong_with_a_row(change, sentence):
    assert sentence in environment("mcqa").validate({**ROW, **change})
