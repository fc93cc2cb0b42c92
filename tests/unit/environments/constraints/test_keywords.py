import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

CASES = [
    ("keywords:existence", {"keywords": ["river", "Stone"]}, "A stone by the RIVER.", True),
    ("keywords:existence", {"keywords": ["river"]}, "Rivers run.", True),  # inside a longer word
    ("keywords:existence", {"keywords": ["river", "stone"]}, "A stone by the lake.", False),
    ("keywords:existence", {"keywords": ["c++"]}, "I write C++.", True),
    ("keywords:existence", {"keywords": ["a.c"]}, "abc", False),  # a keyword is no regular expression
    ("keywords:frequency", {"keyword": " go ", "frequency": 2, "relation": "at least"}, "Go, go!", True),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "at least"}, "Go on.", False),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "less than"}, "Go on.", True),
    ("keywords:frequency", {"keyword": "aa", "frequency": 2, "relation": "at least"}, "aaa", False),  # no overlaps
    (
        "keywords:word_count_different_numbers",
        {"keyword": "go", "frequency": 2, "relation": "at least"},
        "go go go",
        True,
    ),
    (
        "keywords:word_count_different_numbers",
        {"keyword": "go", "frequency": 2, "relation": "less than"},
        "go go",
        False,
    ),
    ("keywords:word_once", {"keyword": "tree"}, "One Tree.", True),
    ("keywords:word_once", {"keyword": "tree"}, "A tree is a tree.", False),
    ("keywords:word_once", {"keyword": "tree"}, "No bush.", False),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A catalogue.", True),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A dog and a Cat.", False),
    ("keywords:forbidden_words", {"forbidden_words": ["c++"]}, "Written in C++.", False),
    ("keywords:exclude_word_harder", {"keyword": "cat"}, "The cat.", True),  # only between two spaces
    ("keywords:exclude_word_harder", {"keyword": "cat", "instruction": "Name a cat"}, "The cat sat.", False),
    ("keywords:exclude_word_harder", {"keyword": "cat"}, "The Cat sat.", True),
    ("keywords:no_adjacent_consecutive", {}, "An owl can fly", True),
    ("keywords:no_adjacent_consecutive", {}, "An ant Bit me", False),
    ("keywords:no_adjacent_consecutive", {}, "Bee ant", True),  # only upwards
    ("keywords:no_adjacent_consecutive", {}, "word", True),
    ("keywords:palindrome", {}, "It was noon then", True),
    ("keywords:palindrome", {}, "I saw it", True),  # a single letter
    ("keywords:palindrome", {}, "It was noon.", False),  # the period belongs to the word
    ("letters:letter_counting", {"N": 5, "relation": "at least"}, "a1b2 cdE", True),
    ("letters:letter_counting", {"N": 5, "relation": "at least"}, "éàüöß abcd", False),  # a to z only
    ("letters:letter_counting", {"N": 5, "relation": "less than"}, "abcde", False),
    ("letters:letter_counting2", {"letter": "E", "let_frequency": 3, "let_relation": "at least"}, "Eleven", True),
    ("letters:letter_counting2", {"letter": "e", "let_frequency": 3, "let_relation": "less than"}, "Eleven", False),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "at least"}, "Eleven", True),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "at least"}, "Ten", False),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, "No!", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keywords_and_letters_are_found_as_the_public_checkers_find_them(case):
    require_verdict(case)


def test_every_keywords_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("keywords", CASES)
