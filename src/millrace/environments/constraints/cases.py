"""Capitals, marks that may not be used, and the language: `change_case:`, `punctuation:` and `language:`."""

from __future__ import annotations

from millrace.environments.constraints.language import LANGUAGES, is_language
from millrace.environments.constraints.registry import COUNT, RELATION, Kind, compare, constraint
from millrace.environments.constraints.text import words
from millrace.environments.constraints.tokens import tokens

LANGUAGE = Kind("the code of a language that langdetect knows, such as en", lambda v: v in LANGUAGES)

TELLING_WORDS = 10
"""Below so many words the detector guesses: it calls two of three English lists of two to four words something else."""


def _is_english(text: str) -> bool:
    """`In English` of the two case constraints. IFEval asks the detector about every text; here one of less than ten
    words passes, since its verdict there is noise, and noise in a reward teaches nothing."""
    return len(words(text)) < TELLING_WORDS or is_language(text, "en")


@constraint("language:response_language", language=LANGUAGE)
def _response_language(text: str, language: str) -> bool:
    return is_language(text, language)


@constraint("change_case:english_capital")
def _english_capital(text: str) -> bool:
    return text.isupper() and _is_english(text)


@constraint("change_case:english_lowercase")
def _english_lowercase(text: str) -> bool:
    return text.islower() and _is_english(text)


@constraint("change_case:capital_word_frequency", capital_frequency=COUNT, capital_relation=RELATION)
def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return compare(sum(token.isupper() for token in tokens(text)), capital_relation, capital_frequency)


@constraint("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


@constraint("punctuation:punctuation_dot")
def _no_dot(text: str) -> bool:
    return "." not in text


@constraint("punctuation:punctuation_exclamation")
def _no_exclamation(text: str) -> bool:
    return "!" not in text
