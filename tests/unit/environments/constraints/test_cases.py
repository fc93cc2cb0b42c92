import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

CASES = [
    ("change_case:english_capital", {}, "ALL 3 OF US.", True),
    ("change_case:english_capital", {}, "ALL 3 of us.", False),
    ("change_case:english_capital", {}, "THE OLD MAN AND THE SEA IS A STORY ABOUT A FISHERMAN.", True),
    ("change_case:english_capital", {}, "DER ALTE MANN UND DAS MEER IST EINE GESCHICHTE VON HEMINGWAY.", False),
    ("change_case:english_lowercase", {}, "all 3 of us.", True),
    ("change_case:english_lowercase", {}, "All 3 of us.", False),
    ("change_case:english_lowercase", {}, "der alte mann und das meer ist eine geschichte von hemingway.", False),
    ("change_case:english_lowercase", {}, "der alte mann", True),  # too short to tell
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A B c", True),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A b", False),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "A B", False),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "(NATO/UN),(EU)",
        True,
    ),
    ("language:response_language", {"language": "de"}, "Der alte Mann fuhr allein auf das Meer hinaus.", True),
    ("language:response_language", {"language": "hi"}, "The old man went out to sea alone.", False),
    ("language:response_language", {"language": "hi"}, "1 2 3", True),  # nothing to go by
    ("punctuation:no_comma", {}, "one and two", True),
    ("punctuation:no_comma", {}, "one, two", False),
    ("punctuation:punctuation_dot", {}, "one; two!", True),
    ("punctuation:punctuation_dot", {}, "3.5", False),
    ("punctuation:punctuation_exclamation", {}, "one.", True),
    ("punctuation:punctuation_exclamation", {}, "one!", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_capitals_marks_and_languages_are_judged(case):
    require_verdict(case)


def test_every_cases_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("cases", CASES)
