import pytest

from millrace.environments.constraints.sentences import punkt_sentences, rule_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("No end", ["No end"]),
        (" \n", []),
        ("Dr. No met 3.5 people.", ["Dr. No met 3.5 people."]),
        ("He lives in the U.S. However, she does not.", ["He lives in the U.S.", "However, she does not."]),
        ("He lives in the U.S. and works.", ["He lives in the U.S. and works."]),
        (
            "It was J. Smith, etc. and so on.",
            ["It was J. Smith, etc.", "and so on."],
        ),  # etc. is no abbreviation of Punkt's
        ("In 1990. it fell.", ["In 1990. it fell."]),
        ("1. Salt", ["1.", "Salt"]),
        ('He said "yes." Then left.', ['He said "yes."', "Then left."]),
        ("(Really?) He left.", ["(Really?)", "He left."]),
        ("Wait... what?", ["Wait... what?"]),
        ("Why?! Go.", ["Why?!", "Go."]),
        ("He said “stop.” Then left.", ["He said “stop.”", "Then left."]),
        ("Look at that (?!).", ["Look at that (?!", ")."]),
        ("It is Michael's. His is here.", ["It is Michael's.", "His is here."]),
        ("One line\nnext. Two", ["One line\nnext.", "Two"]),
    ],
)
def test_punkt_ends_sentences_at_marks_but_not_behind_abbreviations(text, sentences):
    assert punkt_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("No end", ["No end"]),
        (" \n", []),
        ("Dr. No met 3.5 people.", ["Dr. No met 3.5 people."]),
        ("See example.com or x.org. Bye.", ["See example.com or x.org.", "Bye."]),
        ("He lives in the U.S. He works.", ["He lives in the U.S.", "He works."]),
        ("A Ph.D. is long.", ["A Ph.D. is long."]),
        ("She left Foo Inc. But he stayed.", ["She left Foo Inc.", "But he stayed."]),
        ("She left Foo Inc. and went.", ["She left Foo Inc. and went."]),
        ("Wait... what?", ["Wait...", "what?"]),
        ("Why?!", ["Why?", "!"]),
        ('He said "yes." Then left.', ['He said "yes".', "Then left."]),
        ("One line\nnext. Two", ["One line next.", "Two"]),
    ],
)
def test_rules_end_sentences_at_marks_but_not_in_titles_numbers_and_addresses(text, sentences):
    assert rule_sentences(text) == sentences
