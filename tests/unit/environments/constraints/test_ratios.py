import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

CASES = [
    ("ratio:stop_words", {"percentage": 50}, "The cat is black", True),
    ("ratio:stop_words", {"percentage": 40.0}, "The cat is black", False),
    ("ratio:stop_words", {"percentage": 40}, "!?", False),  # no words
    ("ratio:sentence_type", {}, "Yes. No. Why?", True),
    ("ratio:sentence_type", {}, "Yes. Why?", False),
    ("ratio:sentence_type", {}, "Go!", True),  # none of either
    ("ratio:sentence_balance", {}, "Yes. Why? Go!", True),
    ("ratio:sentence_balance", {}, "Yes. Why? Go! Now!", False),
    ("ratio:sentence_words", {}, "We ran. He sat. We ate.", True),
    ("ratio:sentence_words", {}, "We ran. He sat. They ate.", False),
    ("ratio:sentence_words", {}, "I ran. He sat.", False),
    ("ratio:overlap", {"reference_text": "abcdef", "percentage": 50}, "abcxy abc", False),
    ("ratio:overlap", {"reference_text": "abcdef", "percentage": 50}, "abcdxy", True),  # abc and bcd of four
    ("ratio:overlap", {"reference_text": "abcdef", "percentage": 100}, "ab", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shares_are_measured(case):
    require_verdict(case)


def test_every_ratios_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("ratios", CASES)
