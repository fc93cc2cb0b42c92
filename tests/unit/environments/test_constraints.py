import random
import string
import time

import pytest

from millrace.environments.constraints import CONSTRAINTS, count_sentences, find_problem, follows

CASES = [
    # instruction id, kwargs, a text that follows, a text that does not
    ("keywords:existence", {"keywords": ["river", "Stone"]}, "A stone by the RIVER.", "A stone by the lake."),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "at least"}, "Go, go!", "Go on."),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "less than"}, "Go on.", "Go, go!"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A catalogue.", "A dog and a Cat."),
    ("keywords:forbidden_words", {"forbidden_words": ["c++"]}, "Written in C.", "Written in C++."),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "at least"}, "Eleven", "Ten"),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, "No.", "No!"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one, two - three", "one two"),
    ("length_constraints:number_words", {"num_words": 3.0, "relation": "less than"}, "one two", "one two three"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Yes. No?", "Yes"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none *** two\n***", "one *** *** two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "moreover"},
        'One.\n\n"Moreover, two."',
        "Moreover one.\n\nTwo.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "one"},
        "One.\n\nTwo.",
        "One.\n\nTwo.\n\nThree.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [city]", "[name] of city]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. more", "Bye. PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S more", "Bye.\nP.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Here:\n* one\n - two", "* one\n- two\n- three"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* one\n**bold** text", "**bold** text"),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\nfoo\nSECTION 2\nbar",
        "SECTION 1\nfoo\nSECTION\nbar",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', "{'a': 1}"),
    ("detectable_format:json_format", {}, '{"a": null}', '{"a": 1} and more'),
    ("detectable_format:title", {}, "<<Of mice>>\nText", "<< >>\nText"),
    ("detectable_format:title", {}, "Text <<T>>", "<<Of\nmice>>"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! Say hi."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:two_responses", {}, "one ****** two", "one ****** two ****** three"),
    ("startend:end_checker", {"end_phrase": "That is all"}, '"Well, that is ALL"', "That is all, folks"),
    ("startend:quotation", {}, ' "Quoted."\n', 'Not "quoted."'),
    ("change_case:english_capital", {}, "ALL 3 OF US.", "ALL 3 of us."),
    ("change_case:english_lowercase", {}, "all 3 of us.", "All 3 of us."),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A B c", "A b"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "A b", "A B"),
    ("punctuation:no_comma", {}, "one and two", "one, two"),
]

ANY_KWARGS = {
    "a non-empty string": ["a", "(", "*", "[", "P.S."],
    "a non-empty list of strings": [["a", "\\"], ["(?"]],
    "a whole number of at least 0": [0, 3],
    "a whole number of at least 1": [1, 2],
    "a single character": ["a", "["],
}


@pytest.mark.parametrize(("instruction_id", "kwargs", "good", "bad"), CASES)
def test_constraint_tells_following_from_not_following(instruction_id, kwargs, good, bad):
    assert find_problem(instruction_id, kwargs) is None
    assert follows(good, instruction_id, kwargs)
    assert not follows(bad, instruction_id, kwargs)
    assert not follows(" \n", instruction_id, kwargs)


def test_every_constraint_has_a_case_and_there_are_at_least_twenty():
    assert {case[0] for case in CASES} == set(CONSTRAINTS)
    assert len(CONSTRAINTS) >= 20


@pytest.mark.parametrize(
    ("instruction_id", "kwargs", "sentence"),
    [
        ("keywords:existance", {}, "instruction 'keywords:existance' is not known; did you mean 'keywords:existence'?"),
        (7, {}, "instruction 7 is not known"),
        ("keywords:existence", {}, "keywords:existence needs the argument 'keywords': a non-empty list of strings"),
        ("keywords:existence", {"keyword": "a"}, "has no argument 'keyword'; did you mean 'keywords'?"),
        ("punctuation:no_comma", {"count": 1}, "punctuation:no_comma has no argument 'count'; it takes none"),
        ("keywords:existence", {"keywords": "river"}, "keywords must be a non-empty list of strings, not 'river'"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2.5}, "whole number of at least 0, not 2.5"),
        ("detectable_format:number_bullet_lists", {"num_bullets": float("nan")}, "whole number of at least 0, not nan"),
        ("detectable_format:number_bullet_lists", {"num_bullets": float("inf")}, "whole number of at least 0, not inf"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "relation must be one of"),
    ],
)
def test_unusable_kwargs_are_named_in_a_sentence(instruction_id, kwargs, sentence):
    assert sentence in find_problem(instruction_id, kwargs)


def _some_kwargs(constraint, rng):
    return {
        name: rng.choice(ANY_KWARGS.get(kind.description, ["less than", "at least"]))
        for name, kind in constraint.kinds.items()
    }


def test_no_text_makes_a_checker_raise():
    rng = random.Random(5)
    alphabet = string.printable + "*[]<>{}\"'\\\n\n  ΣŁßé\u2028\x00\ud800"
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 80)))
        for instruction_id, constraint in CONSTRAINTS.items():
            follows(text, instruction_id, _some_kwargs(constraint, rng))


@pytest.mark.parametrize(
    "piece", ["[", "*", "\n", " ", "<", "<<", "{", "[1,", '"', "a", "p.", "***", "******", ". ", "9"]
)
def test_a_long_text_made_to_hurt_is_checked_in_linear_time(piece):
    text = "x" + piece * (200_000 // len(piece))
    rng = random.Random(1)
    start = time.process_time()
    for instruction_id, constraint in CONSTRAINTS.items():
        follows(text, instruction_id, _some_kwargs(constraint, rng))
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("text", "count"),
    [("One. Two! Three?", 3), ("Dr. No met 3.5 people.", 1), ("No end", 1), ('He said "yes." Then left.', 2)],
)
def test_sentences_end_at_a_mark_before_white_space(text, count):
    assert count_sentences(text) == count
