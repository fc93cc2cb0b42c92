import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

CASES = [
    ("words:alphabet", {}, "You zigzag above big, calm dunes", True),
    ("words:alphabet", {}, "A big dune", False),
    ("words:alphabet", {}, "1 2", False),
    ("words:alphabet", {}, "...", False),
    ("words:vowel", {}, "A cat sits on top\n", True),
    ("words:vowel", {}, "A cute cat sits on top", False),
    ("words:vowel", {}, "A cat\nsat", False),  # two paragraphs
    ("words:consonants", {}, "Strong plants", True),
    ("words:consonants", {}, "Strong a plants", False),
    ("words:palindrome", {}, "Level, civic radar kayak refer rotor madam solos tenet stats", True),
    ("words:palindrome", {}, "level civic radar kayak refer rotor madam solos tenet noon", False),
    ("words:prime_lengths", {}, "It's four words", False),
    ("words:prime_lengths", {}, "The red fox is quick.", True),
    ("words:repeats", {"small_n": 2}, "No, no maybe", True),
    ("words:repeats", {"small_n": 1}, "No, no maybe", False),
    ("words:last_first", {}, "I saw a Cat. Cat food is good. Good for us.", True),
    ("words:last_first", {}, "I saw a cat. Food is good.", False),
    ("words:last_first", {}, "One sentence", True),
    ("words:paragraph_last_first", {}, "Go and go!\n\nStay", True),
    ("words:paragraph_last_first", {}, "Go and go!\nStay here", False),
    ("words:no_consecutive", {}, "An owl ate bread", True),
    ("words:no_consecutive", {}, "An apple fell", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_patterns_in_words_are_found(case):
    require_verdict(case)


def test_every_word_patterns_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("word_patterns", CASES)
