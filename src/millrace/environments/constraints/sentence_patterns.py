"""Patterns in the sentences of a text: `sentence:`."""

from __future__ import annotations

import re
from itertools import pairwise

from millrace.environments.constraints.registry import COUNT, POSITIVE, WORD, constraint
from millrace.environments.constraints.sentences import punkt_sentences
from millrace.environments.constraints.text import EDGES, unpunctuated


@constraint("sentence:keyword", word=WORD, N=POSITIVE)
def _keyword(text: str, word: str, N: int) -> bool:
    """The N-th sentence has the word as a whole one."""
    sentences = punkt_sentences(text)
    pattern = rf"\b{re.escape(word)}\b"
    return len(sentences) >= N and re.search(pattern, sentences[N - 1], re.IGNORECASE) is not None


@constraint("sentence:increment", small_n=COUNT)
def _increment(text: str, small_n: int) -> bool:
    """Each sentence has small_n words more than the one before."""
    lengths = [len(unpunctuated(sentence).split()) for sentence in punkt_sentences(text)]
    return all(longer == shorter + small_n for shorter, longer in pairwise(lengths))


@constraint("sentence:alliteration_increment")
def _alliteration_increment(text: str) -> bool:
    """Each sentence has more words than the one before that stand in a row with the same first letter."""
    return all(more > less for less, more in pairwise(map(_alliterating_words, punkt_sentences(text))))


def _alliterating_words(sentence: str) -> int:
    """Words in runs of at least two with one first letter."""
    stripped = (word.lstrip(EDGES) for word in sentence.lower().split())
    firsts = [word[0] for word in stripped if word]
    same = [a == b for a, b in pairwise(firsts)]
    return sum(1 if before else 2 for before, now in zip([False, *same], same, strict=False) if now)
