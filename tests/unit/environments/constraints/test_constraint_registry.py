import random
import string
import time

import pytest

from millrace.environments.constraints import CONSTRAINTS, find_problem, follows
from millrace.environments.constraints.registry import UNCHECKED

IFEVAL = """keywords:existence keywords:frequency keywords:forbidden_words keywords:letter_frequency
language:response_language length_constraints:number_sentences length_constraints:number_paragraphs
length_constraints:number_words length_constraints:nth_paragraph_first_word detectable_content:number_placeholders
detectable_content:postscript detectable_format:number_bullet_lists detectable_format:constrained_response
detectable_format:number_highlighted_sections detectable_format:multiple_sections detectable_format:json_format
detectable_format:title combination:two_responses combination:repeat_prompt startend:end_checker startend:quotation
change_case:capital_word_frequency change_case:english_capital change_case:english_lowercase punctuation:no_comma"""

IF_RLVR = """copy:repeat_phrase copy:copy new:copy_span_idx detectable_format:sentence_hyphens
keywords:no_adjacent_consecutive detectable_format:square_brackets keywords:word_once
keywords:word_count_different_numbers keywords:exclude_word_harder paragraphs:paragraphs paragraphs:paragraphs2
first_word:first_word_sent first_word:first_word_answer last_word:last_word_sent last_word:last_word_answer
detectable_format:bigram_wrapping copy:copying_simple copy:copying_multiple punctuation:punctuation_dot
punctuation:punctuation_exclamation count:lowercase_counting letters:letter_counting letters:letter_counting2
count:counting_composition count:count_unique count:count_increment_word keywords:palindrome
keywords:keyword_specific_position keywords:start_end"""

IFBENCH = """count:word_count_range count:unique_word_count ratio:stop_words ratio:sentence_type ratio:sentence_balance
count:conjunctions count:person_names ratio:overlap count:numbers words:alphabet words:vowel words:consonants
sentence:alliteration_increment words:palindrome count:punctuation format:parentheses format:quotes words:prime_lengths
format:options format:newline format:emoji ratio:sentence_words count:words_japanese words:start_verb words:repeats
sentence:keyword count:pronouns words:odd_even_syllables words:last_first words:paragraph_last_first sentence:increment
words:no_consecutive format:line_indent format:quote_unquote format:list format:thesis format:sub-bullets
format:no_bullets_bullets custom:multiples custom:mcq_count_length custom:reverse_newline custom:word_reverse
custom:character_reverse custom:sentence_alphabet custom:european_capitals_sort custom:csv_city
custom:csv_special_character custom:csv_quotes custom:date_format_list count:keywords_multiple
words:keywords_specific_position words:words_position repeat:repeat_change repeat:repeat_simple repeat:repeat_span
format:title_case format:output_template format:no_whitespace"""


def test_all_of_ifeval_and_if_rlvr_and_56_of_ifbench_are_checked():
    ifeval, if_rlvr, ifbench = set(IFEVAL.split()), set(IF_RLVR.split()), set(IFBENCH.split())
    assert (len(ifeval), len(if_rlvr), len(ifbench)) == (25, 29, 58)
    assert set(CONSTRAINTS) == ifeval | if_rlvr | (ifbench - set(UNCHECKED))
    assert len(UNCHECKED) == 2


@pytest.mark.parametrize(
    ("instruction_id", "kwargs", "sentence"),
    [
        ("keywords:existance", {}, "instruction 'keywords:existance' is not known; did you mean 'keywords:existence'?"),
        (7, {}, "instruction 7 is not known"),
        ("words:start_verb", {}, "is not checked here: it is defined by NLTK's part-of-speech tagger"),
        ("words:odd_even_syllables", {}, "is not checked here: it is defined by the pronunciation list"),
        ("keywords:existence", {}, "keywords:existence needs the argument 'keywords': a non-empty list of strings"),
        ("keywords:existence", {"keyword": "a"}, "has no argument 'keyword'; did you mean 'keywords'?"),
        ("punctuation:no_comma", {"count": 1}, "punctuation:no_comma has no argument 'count'; it takes none"),
        ("keywords:existence", {"keywords": "river"}, "keywords must be a non-empty list of strings, not 'river'"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2.5}, "whole number of at least 0, not 2.5"),
        ("detectable_format:number_bullet_lists", {"num_bullets": float("nan")}, "whole number of at least 0, not nan"),
        ("detectable_format:number_bullet_lists", {"num_bullets": float("inf")}, "whole number of at least 0, not inf"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "relation must be one of"),
        ("count:count_increment_word", {"keyword1": ["a", "b"], "keyword2": "c"}, "keyword1 must be a word or phrase"),
        ("ratio:stop_words", {"percentage": 101}, "percentage must be a number from 0 to 100, not 101"),
        ("language:response_language", {"language": "klingon"}, "language must be the code of a language"),
    ],
)
def test_unusable_kwargs_are_named_in_a_sentence(instruction_id, kwargs, sentence):
    assert sentence in find_problem(instruction_id, kwargs)


def test_an_empty_text_follows_nothing():
    rng = random.Random(3)
    for instruction_id, constraint in CONSTRAINTS.items():
        assert not follows(" \n", instruction_id, some_kwargs(constraint, rng))


def some_kwargs(constraint, rng):
    """Arguments that are accepted, odd ones where there are."""
    by_kind = {
        "a non-empty string": ["a", "(", "*", "[", "P.S.", "a/b"],
        "a word or phrase": ["a", "(", ["*"], "one two", "\\"],
        "a non-empty list of strings": [["a", "\\"], ["(?"]],
        "a whole number of at least 0": [0, 3.0],
        "a whole number of at least 1": [1, 2.0],
        "a number from 0 to 100": [0, 12.5],
        "a single character": ["a", "["],
        "the code of a language that langdetect knows, such as en": ["en", "zh-cn"],
    }
    kwargs = {
        name: rng.choice(by_kind.get(kind.description, ["less than", "at least"]))
        for name, kind in constraint.kinds.items()
    }
    assert find_problem(constraint.instruction_id, kwargs) is None
    return kwargs


def test_no_text_makes_a_checker_raise():
    rng = random.Random(5)
    alphabet = string.printable + "*[]<>{}\"'\\\n\n.?! ΣŁßéİ\u2028\x00\ud800\ue000\ue001猫😀"
    for _ in range(150):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 80)))
        for instruction_id, constraint in CONSTRAINTS.items():
            assert follows(text, instruction_id, some_kwargs(constraint, rng)) in (True, False)


HURTING = (
    *(
        "[",
        "*",
        "\n",
        " ",
        "<",
        "<<",
        "{",
        "[1,",
        '"',
        "'",
        "a",
        "***",
        "******",
        ". ",
        "9",
        "a.",
        "?",
        "a\n",
        "\n*",
        "a b ",
    ),
    *("Question 1", "--", "`", ',"', "Mr. ", "- ", "can't ", "@a"),
)


@pytest.mark.parametrize("piece", HURTING)
def test_a_long_text_made_to_hurt_is_checked_in_linear_time(piece):
    text = "x" + piece * (20_000 // len(piece))  # a step for each pair of characters would take seconds
    rng = random.Random(1)
    for instruction_id, constraint in CONSTRAINTS.items():
        kwargs = some_kwargs(constraint, rng)
        quick = any(
            _seconds(text, instruction_id, kwargs) < 0.5 for _ in range(3)
        )  # a busy machine may take one longer
        assert quick, instruction_id


def _seconds(text, instruction_id, kwargs):
    start = time.process_time()
    follows(text, instruction_id, kwargs)
    return time.process_time() - start
