import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

FIVE = {f"keyword{i}": letter for i, letter in enumerate("abcde", start=1)}

CASES = [
    ("count:lowercase_counting", {"N": 2}, "The Big red dog", True),
    ("count:lowercase_counting", {"N": 2}, "a red red Dog", False),  # all of them, not each
    ("count:count_unique", {}, "No word comes twice.", True),
    ("count:count_unique", {}, "No word. No.", False),
    ("count:count_unique", {}, "Yes. Really.", False),  # two periods
    ("count:count_unique", {}, "The the", True),
    ("count:count_increment_word", {"keyword1": "cat", "keyword2": ["dog"]}, "A dog, a Cat, a dog", True),
    ("count:count_increment_word", {"keyword1": "cat", "keyword2": "dog"}, "A dog and a cat", False),
    ("count:counting_composition", {"n_sent": 1, "n_words": 3}, "One two.***Three four.***Five six!", True),
    ("count:counting_composition", {"n_sent": 1, "n_words": 2}, "One two.***Three four.***Five six!", False),
    ("count:counting_composition", {"n_sent": 1, "n_words": 3}, "One two.***Three four.***", False),
    ("count:counting_composition", {"n_sent": 2, "n_words": 2}, "A. B.***A. B.***A. B.", False),
    ("count:word_count_range", {"min_words": 2.0, "max_words": 3.0}, "one two three", True),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "one", False),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "it's two words", False),
    ("count:unique_word_count", {"N": 2}, "One. ONE two!", True),
    ("count:unique_word_count", {"N": 2}, "One, one.", False),
    ("count:conjunctions", {"small_n": 2}, "you and me or them", True),
    ("count:conjunctions", {"small_n": 2}, "you and me", False),
    ("count:conjunctions", {"small_n": 2}, "And you and me", True),  # as they are written
    ("count:person_names", {"N": 2}, "Emma met Liam.", True),
    ("count:person_names", {"N": 2}, "Emma met emma and Liams.", False),
    ("count:numbers", {"N": 2}, "1,000.5 and 7", True),
    ("count:numbers", {"N": 2}, "1 2 3", False),
    ("count:punctuation", {}, "What?! Well, yes; no: stop. Why? Go!", True),
    ("count:punctuation", {}, "What?! Well, yes; no: stop. Why?", False),  # the interrobang's ! does not count
    ("count:punctuation", {}, "What? Well, yes; no: stop. Go!", False),
    ("count:pronouns", {"N": 3}, "He/She saw it.", True),
    ("count:pronouns", {"N": 3}, "He saw it.", False),
    ("count:words_japanese", {"N": 2}, "one 猫 three いぬ 5", True),
    ("count:words_japanese", {"N": 2}, "one 猫 three four", False),
    ("count:words_japanese", {"N": 2}, "one 2 three !!", True),
    ("count:keywords_multiple", FIVE, "a" + "b" * 2 + "c" * 3 + "d" * 5 + "E" * 7, True),
    ("count:keywords_multiple", FIVE, "a" + "b" * 2 + "c" * 3 + "d" * 5 + "e" * 8, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_words_numbers_names_and_marks_are_counted(case):
    require_verdict(case)


def test_every_counting_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("counting", CASES)
