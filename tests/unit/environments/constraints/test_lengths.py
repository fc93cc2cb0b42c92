import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

NTH = "length_constraints:nth_paragraph_first_word"

CASES = [
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one, two - three", True),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two", False),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's two", True),  # it, s, two
    ("length_constraints:number_words", {"num_words": 3.0, "relation": "less than"}, "one two three", False),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Yes. No?", True),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Dr. No left", False),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "1. Salt.", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none *** two\n***", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one *** *** two", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n\ntwo", False),
    ("paragraphs:paragraphs", {}, "one***two", True),
    ("paragraphs:paragraphs", {}, "one***two***three", False),
    ("paragraphs:paragraphs2", {}, "one\n\ntwo\n\n", True),
    ("paragraphs:paragraphs2", {}, "one\n\n\n\ntwo", False),
    ("paragraphs:paragraphs2", {}, "one\ntwo", False),
    (NTH, {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Moreover"}, "One.\n\nMoreover, two.", True),
    (NTH, {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "moreover"}, "Moreover one.\n\nTwo.", False),
    (NTH, {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "one"}, "One.\n\nTwo.\n\nThree.", False),
    (NTH, {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "don"}, "'\"Don't go", True),  # up to the mark
    (
        NTH,
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
        "One\n\n\n\nTwo",
        False,
    ),  # the second is empty
    (NTH, {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "one"}, "One", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_words_sentences_and_paragraphs_are_counted_as_in_ifeval(case):
    require_verdict(case)


def test_every_lengths_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("lengths", CASES)
