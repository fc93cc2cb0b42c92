import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

SECTIONS = "detectable_format:multiple_sections"

CASES = [
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [city]", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of city]", False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a [b]]", False),  # one, from [ to the next ]
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "[two\nlines]", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. more", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye. PS more", False),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S more", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.S. more", False),
    ("detectable_content:postscript", {"postscript_marker": "Note:"}, "NOTE: more", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Here:\n* one\n - two", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two\n- three", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* one\n**bold** text", True),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 1},
        "*\n* one",
        True,
    ),  # the second is the first one's text
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "one\n*", False),  # nothing follows the *
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", True),
    ("detectable_format:constrained_response", {}, "My answer is perhaps.", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and ** **", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a\nb*", False),
    (SECTIONS, {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\nfoo\nSECTION 2\nbar", True),
    (SECTIONS, {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\nfoo\nSECTION\nbar", False),
    (SECTIONS, {"section_spliter": "Day (", "num_sections": 1}, "Day (1", True),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', True),
    ("detectable_format:json_format", {}, '{"a": null}', True),
    ("detectable_format:json_format", {}, '{"a": 1} and more', False),
    ("detectable_format:json_format", {}, "[" * 100_000, False),
    ("detectable_format:title", {}, "<<Of mice>>\nText", True),
    ("detectable_format:title", {}, "<<a < b>>", True),
    ("detectable_format:title", {}, "<< >>\nText", False),
    ("detectable_format:title", {}, "<<>>", False),
    ("detectable_format:title", {}, "<<Of\nmice>>", False),
    ("detectable_format:sentence_hyphens", {}, "One went.-Two came.", True),
    ("detectable_format:sentence_hyphens", {}, "One went. -Two came.", False),
    ("detectable_format:square_brackets", {}, "[All] [of] [it.]", True),
    ("detectable_format:square_brackets", {}, "[All] of [it].", False),
    ("detectable_format:bigram_wrapping", {}, "<<I am>> <<at home>> now", True),
    ("detectable_format:bigram_wrapping", {}, "<<I am>> at home", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_marks_are_found_as_the_public_checkers_find_them(case):
    require_verdict(case)


def test_every_formats_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("formats", CASES)
