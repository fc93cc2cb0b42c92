"""Words and letters that must, or must not, appear: `keywords:` and `letters:`.

The public checkers take a keyword for a regular expression; here it stands for itself, so that `c++` means c++. Without
one of `.^$*+?{}[]\\|()` in the keyword the two are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from millrace.environments.constraints.registry import COUNT, LETTER, RELATION, TEXTS, WORD, compare, constraint


def occurrences(text: str, keyword: str) -> int:
    """How often a keyword appears, also inside a longer word, in any case."""
    return text.lower().count(keyword.lower())


@constraint("keywords:existence", keywords=TEXTS)
def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(occurrences(text, keyword) for keyword in keywords)


@constraint("keywords:frequency", keyword=WORD, frequency=COUNT, relation=RELATION)
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(occurrences(text, keyword), relation, frequency)


@constraint("keywords:word_count_different_numbers", keyword=WORD, frequency=COUNT, relation=RELATION)
def _frequency_again(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """Its sentence asks for the number itself; its public checker compares, as `keywords:frequency` does."""
    return compare(occurrences(text, keyword), relation, frequency)


@constraint("keywords:word_once", keyword=WORD)
def _once(text: str, keyword: str) -> bool:
    return occurrences(text, keyword) == 1


@constraint("keywords:forbidden_words", forbidden_words=TEXTS)
def _forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """Whole words only: `cat` does not forbid `catalogue`."""
    return not any(re.search(rf"(?<!\w){re.escape(w.strip())}(?!\w)", text, re.IGNORECASE) for w in forbidden_words)


@constraint("keywords:exclude_word_harder", unread=("instruction",), keyword=WORD)
def _exclude_word_harder(text: str, keyword: str) -> bool:
    """Only the word between two spaces, in the keyword's own case, is forbidden."""
    return f" {keyword} " not in text


@constraint("keywords:no_adjacent_consecutive")
def _no_adjacent_consecutive(text: str) -> bool:
    """No word starts with the letter that follows the one before it starts with."""
    firsts = [word[0].lower() for word in text.split()]
    return all(len(a) == len(b) == 1 and ord(b) - ord(a) != 1 for a, b in pairwise(firsts))


@constraint("keywords:palindrome")
def _palindrome(text: str) -> bool:
    """Some word reads the same backwards; one of a single letter does."""
    return any(word == word[::-1] for word in text.split())


@constraint("letters:letter_counting", N=COUNT, relation=RELATION)
def _letter_counting(text: str, N: int, relation: str) -> bool:
    """Letters are a to z and A to Z."""
    return compare(len(re.findall(r"[a-zA-Z]", text)), relation, N)


@constraint("letters:letter_counting2", letter=LETTER, let_frequency=COUNT, let_relation=RELATION)
@constraint("keywords:letter_frequency", letter=LETTER, let_frequency=COUNT, let_relation=RELATION)
def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)
