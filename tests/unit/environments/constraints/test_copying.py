import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

PHRASE = "copy:repeat_phrase"

CASES = [
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Hi! Say hi.", False),
    ("combination:two_responses", {}, "one\n******\ntwo", True),
    ("combination:two_responses", {}, "one\n******\none", False),
    ("combination:two_responses", {}, "one ****** two ****** three", False),
    ("combination:two_responses", {}, "******one******two******", True),
    ("copy:copy", {"prompt_to_repeat": " Say hi."}, "say hi.\n", True),
    ("copy:copy", {"prompt_to_repeat": "Say hi."}, "say hi", False),
    ("copy:copying_simple", {"prompt_to_repeat": "Say hi."}, "Say hi.", True),
    ("copy:copying_simple", {"prompt_to_repeat": "Say hi."}, "Hi.", False),
    ("copy:copying_multiple", {"prompt_to_repeat": "Say hi.", "N": 2}, "Say hi. ****** Say hi.", True),
    ("copy:copying_multiple", {"prompt_to_repeat": "Say hi.", "N": 3}, "Say hi. ****** Say hi.", False),
    ("copy:copying_multiple", {"prompt_to_repeat": "Say hi.", "N": 2}, "Say hi. ****** Hi.", False),
    ("new:copy_span_idx", {"prompt_to_repeat": "The quick fox", "n_start": 4, "n_end": 9}, "QUICK", True),
    ("new:copy_span_idx", {"prompt_to_repeat": "The quick fox", "n_start": 4, "n_end": 8}, "quick", False),
    ("new:copy_span_idx", {"prompt_to_repeat": "The quick fox", "n_start": 0, "n_end": 3}, "The", True),
    ("repeat:repeat_span", {"prompt_to_repeat": "The quick fox", "n_start": 4, "n_end": 8}, "quick", True),
    ("repeat:repeat_span", {"prompt_to_repeat": "The quick fox", "n_start": 4, "n_end": 7}, "quick", False),
    ("repeat:repeat_simple", {}, "only output this sentence here, ignore all other requests. ", True),
    ("repeat:repeat_simple", {}, "Only output this sentence here", False),
    ("repeat:repeat_change", {"prompt_to_repeat": "Say hi now"}, "Shout hi  now", True),
    ("repeat:repeat_change", {"prompt_to_repeat": "Say hi now"}, "Say hi now", False),
    ("repeat:repeat_change", {"prompt_to_repeat": "Say hi now"}, "Shout hi then", False),
    (PHRASE, {"phrase": "live each day well", "small_n": 2}, "live each hour well; live all day well", True),
    (PHRASE, {"phrase": "live each day well", "small_n": 2}, "live each hour well", False),
    (PHRASE, {"phrase": "live each day well", "small_n": 1}, "live each day well", False),  # the last one must differ
    (PHRASE, {"phrase": "live each day well", "small_n": 1}, "live any hour well", False),
    (PHRASE, {"phrase": "live each day well", "small_n": 1}, "live each long day well", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeated_texts_are_compared_as_the_public_checkers_do(case):
    require_verdict(case)


def test_every_copying_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("copying", CASES)
