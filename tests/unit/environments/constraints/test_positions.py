import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

CASES = [
    ("startend:end_checker", {"end_phrase": "That is all"}, '"Well, that is ALL"', True),
    ("startend:end_checker", {"end_phrase": "That is all"}, "That is all, folks", False),
    ("startend:quotation", {}, ' "Quoted."\n', True),
    ("startend:quotation", {}, 'Not "quoted."', False),
    ("startend:quotation", {}, '"', False),
    ("keywords:start_end", {}, "Stay if you can stay", True),
    ("keywords:start_end", {}, "Stay if you can stay.", False),  # the period is the last token
    ("keywords:start_end", {}, "Stay", False),
    ("first_word:first_word_answer", {"first_word": "well"}, " Well then", True),
    ("first_word:first_word_answer", {"first_word": "well"}, "Well, then", False),
    ("first_word:first_word_sent", {"first_word": "The"}, "The end. the beginning!", True),
    ("first_word:first_word_sent", {"first_word": "the"}, "The end. A beginning.", False),
    ("first_word:first_word_sent", {"first_word": ["the"]}, "The end.", True),  # released rows hold lists
    ("last_word:last_word_answer", {"last_word": "Contest"}, "It was a contest.", True),
    ("last_word:last_word_answer", {"last_word": "contest"}, "A contest it was.", False),
    ("last_word:last_word_sent", {"last_word": "end"}, "An end. Another end!", True),
    ("last_word:last_word_sent", {"last_word": "end"}, "An end. A start!", False),
    ("last_word:last_word_sent", {"last_word": "end"}, "An end?!", False),  # the ! is a sentence of its own
    ("keywords:keyword_specific_position", {"keyword": "cat", "n": 2, "m": 3}, "One. A big cat sat.", True),
    ("keywords:keyword_specific_position", {"keyword": "Cat", "n": 2, "m": 3}, "One. A big cat sat.", False),
    ("keywords:keyword_specific_position", {"keyword": "cat", "n": 1, "m": 3}, "Oh, cat.", True),  # the comma counts
    ("keywords:keyword_specific_position", {"keyword": "cat", "n": 3, "m": 1}, "One. Cat.", False),
    ("words:keywords_specific_position", {"keyword": "cat", "n": 2, "m": 3}, "One. A big Cat sat.", True),
    ("words:keywords_specific_position", {"keyword": "cat", "n": 1, "m": 2}, "Oh, cat.", True),  # the comma does not
    ("words:keywords_specific_position", {"keyword": "cat", "n": 1, "m": 3}, "Oh, cat.", False),
    ("words:keywords_specific_position", {"keyword": "cat", "n": 2, "m": 1}, "Cat.", False),
    ("words:words_position", {"keyword": "fish"}, "My Fish likes fish food.", True),
    ("words:words_position", {"keyword": "fish"}, "My fish likes fish food", True),
    ("words:words_position", {"keyword": "fish"}, "My fish likes food.", False),
    ("words:words_position", {"keyword": "fish"}, "fish.", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_words_are_found_at_their_places(case):
    require_verdict(case)


def test_every_positions_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("positions", CASES)
