import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

CASES = [
    ("sentence:keyword", {"word": "cat", "N": 2.0}, "One. The Cat sat.", True),
    ("sentence:keyword", {"word": "cat", "N": 2}, "One. The cats sat.", False),
    ("sentence:keyword", {"word": "cat", "N": 3}, "One. Cat.", False),
    ("sentence:increment", {"small_n": 2}, "Go. Go home now. Go to the house now.", True),
    ("sentence:increment", {"small_n": 2}, "Go. Go home. Go to the house now.", False),
    ("sentence:increment", {"small_n": 2}, "One sentence", True),
    ("sentence:alliteration_increment", {}, "He ran. Big bears sat. Six sad seals sat.", True),
    ("sentence:alliteration_increment", {}, "Big bears sat. He ran.", False),
    ("sentence:alliteration_increment", {}, "One two. Three four.", False),  # not more: two after two
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_patterns_in_sentences_are_found(case):
    require_verdict(case)


def test_every_sentence_patterns_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("sentence_patterns", CASES)
