import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

CASES = [
    ("format:parentheses", {}, "a (b [c {d (e [f])}])", True),
    ("format:parentheses", {}, "(a [b {c (d)}])", False),
    ("format:parentheses", {}, "((((( never closed", False),
    ("format:parentheses", {}, "((]((((", False),  # a wrong one starts anew
    ("format:quotes", {}, '"She said \'he said "no"\'"', True),
    ("format:quotes", {}, "\"She said 'no'\"", False),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", True),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe not", False),
    ("format:options", {"options": "I know or I don't know"}, "i don't know", True),
    ("format:options", {"options": "a), b), c), d)"}, "b)", True),
    ("format:options", {"options": "a), b), c), d)"}, "B", False),
    ("format:newline", {}, "One\n\ntwo,\nthree!", True),
    ("format:newline", {}, "One two\nthree", False),
    ("format:emoji", {}, "I am glad 😀. You too! 😎", True),
    ("format:emoji", {}, "I am glad. You too 😎", False),
    ("format:emoji", {}, "Number 7.", False),  # a digit is no emoji
    ("format:line_indent", {}, "a\n b\n\n   c", True),
    ("format:line_indent", {}, "a\n b\n c", False),
    ("format:quote_unquote", {}, 'He said "no", which meant yes.', True),
    ("format:quote_unquote", {}, 'He said "no" "yes" twice', False),
    ("format:quote_unquote", {}, "He said “no.”", False),
    ("format:list", {"sep": "!?!?"}, "!?!? one\n!?!? two", True),
    ("format:list", {"sep": "!?!?"}, "!?!? one\n- two", False),
    ("format:thesis", {}, "<i>All is one.</i> Since it is.", True),
    ("format:thesis", {}, "<em>All is one.</em> Since it is.", True),
    ("format:thesis", {}, "<i>All is one.</i>", False),
    ("format:thesis", {}, "<i> </i> Since it is.", False),
    ("format:thesis", {}, "*All is one.* Since it is.", False),
    ("format:sub-bullets", {}, "* one\n - a\n* two\n - b", True),
    ("format:sub-bullets", {}, "* one\n - a\n* two", False),
    ("format:no_bullets_bullets", {}, "One. Two.\n\n* a\n* b", True),
    ("format:no_bullets_bullets", {}, "One.\n* a\n* b", False),
    ("format:no_bullets_bullets", {}, "One. Two.\n* a\nmore\n* b", False),
    ("format:no_bullets_bullets", {}, "One. Two.\n\nThree.\n* a\n* b", False),  # text behind an empty line
    ("format:title_case", {}, "The Old Man And The iPhone", True),
    ("format:title_case", {}, "The Old man", False),
    ("format:title_case", {}, "A NASA Plan", True),
    ("format:title_case", {}, "I Met a Man", False),
    ("format:output_template", {}, "My Answer: a My Conclusion: b Future Outlook: c", True),
    ("format:output_template", {}, "My Answer: a Future Outlook: c", False),
    ("format:no_whitespace", {}, "onlyoneword", True),
    ("format:no_whitespace", {}, "two\u3000words", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts_are_recognised(case):
    require_verdict(case)


def test_every_layout_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("layout", CASES)
