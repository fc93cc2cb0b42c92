"""Patterns in the words of a text: `words:`."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from string import ascii_lowercase

from millrace.environments.constraints.registry import COUNT, constraint
from millrace.environments.constraints.sentences import punkt_sentences
from millrace.environments.constraints.text import EDGES, unpunctuated

PRIMES = frozenset({2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97})
CONSONANT_CLUSTER = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")


@constraint("words:alphabet")
def _alphabet(text: str) -> bool:
    """Each word starts with the letter that follows the one before, and a follows z."""
    firsts = [word.lower()[0] for word in unpunctuated(text).split()]
    if not firsts or firsts[0] not in ascii_lowercase:
        return False
    start = ascii_lowercase.index(firsts[0])
    return all(first == ascii_lowercase[(start + i) % 26] for i, first in enumerate(firsts))


@constraint("words:vowel")
def _vowels(text: str) -> bool:
    """One paragraph with at most three of the five vowels."""
    return "\n" not in text.strip() and len(set(text.lower()) & set("aeiou")) <= 3


@constraint("words:consonants")
def _consonants(text: str) -> bool:
    """Every word has two consonants in a row."""
    return all(CONSONANT_CLUSTER.search(word) for word in text.lower().split())


@constraint("words:palindrome")
def _palindromes(text: str) -> bool:
    """Ten words of at least five letters that read the same backwards."""
    found = unpunctuated(text).lower().split()
    return sum(len(word) >= 5 and word == word[::-1] for word in found) >= 10


@constraint("words:prime_lengths")
def _prime_lengths(text: str) -> bool:
    """Every word has a prime number of letters, below 100."""
    return all(len(word) in PRIMES for word in unpunctuated(text).split())


@constraint("words:repeats", small_n=COUNT)
def _repeats(text: str, small_n: int) -> bool:
    """No word comes more than small_n times."""
    counts = Counter(unpunctuated(text.lower()).split())
    return not counts or max(counts.values()) <= small_n


@constraint("words:last_first")
def _last_first(text: str) -> bool:
    """Each sentence begins with the last word of the one before."""
    return all(map(_continues, *_neighbours(punkt_sentences(text))))


def _neighbours(sentences: list[str]) -> tuple[list[str], list[str]]:
    return sentences[:-1], sentences[1:]


def _continues(sentence: str, following: str) -> bool:
    last, first = sentence.rstrip(EDGES).split(), following.lstrip(EDGES).split()
    return bool(last) and bool(first) and last[-1].lower() == first[0].lower()


@constraint("words:paragraph_last_first")
def _paragraph_last_first(text: str) -> bool:
    """Each line ends with the word it started with."""
    lines = [line.strip().lower().strip(EDGES).split() for line in text.split("\n")]
    return all(line[0] == line[-1] for line in lines if line)


@constraint("words:no_consecutive")
def _no_consecutive(text: str) -> bool:
    """No two words in a row start with the same letter."""
    found = unpunctuated(text.lower()).split()
    return all(a[0] != b[0] for a, b in pairwise(found))
