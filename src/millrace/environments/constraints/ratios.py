"""Shares of words and kinds of sentences: `ratio:`."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.environments.constraints.registry import TEXT, Kind, constraint
from millrace.environments.constraints.sentences import punkt_sentences
from millrace.environments.constraints.text import listed, words

PERCENTAGE = Kind(
    "a number from 0 to 100", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 100
)
TOLERANCE = 2
"""Percentage points that an overlap may be off."""

STOP_WORDS = frozenset(
    listed(
        """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves what which who whom this that these those am is are
    was were be been being have has had having do does did doing a an the and but if or because as until while
    of at by for with about against between into through during before after above below to from up down in out
    on off over under again further then once here there when where why how all any both each few more most
    other some such no nor not only own same so than too very s t can will just don should now d ll m o re ve y
    ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn
    """
    )
)
"""NLTK's English stop words that a word without an apostrophe can be."""


@constraint("ratio:stop_words", percentage=PERCENTAGE)
def _stop_words(text: str, percentage: float) -> bool:
    """At most so many percent of the words."""
    found = words(text.lower())
    return bool(found) and 100 * sum(word in STOP_WORDS for word in found) / len(found) <= percentage


def _endings(text: str, marks: str) -> list[int]:
    sentences = punkt_sentences(text)
    return [sum(sentence.endswith(mark) for sentence in sentences) for mark in marks]


@constraint("ratio:sentence_type")
def _sentence_type(text: str) -> bool:
    """Twice as many sentences end with a period as with a question mark."""
    statements, questions = _endings(text, ".?")
    return statements == 2 * questions


@constraint("ratio:sentence_balance")
def _sentence_balance(text: str) -> bool:
    """As many sentences end with a period as with a question mark and as with an exclamation mark."""
    return len(set(_endings(text, ".?!"))) == 1


@constraint("ratio:sentence_words")
def _sentence_lengths(text: str) -> bool:
    """Three sentences of as many characters. That their words differ is asked, but not checked by IFBench."""
    lengths = [len(sentence) for sentence in punkt_sentences(text)]
    return len(lengths) == 3 and len(set(lengths)) == 1


@constraint("ratio:overlap", reference_text=TEXT, percentage=PERCENTAGE)
def _overlap(text: str, reference_text: str, percentage: float) -> bool:
    """The share of the text's different runs of three characters that the reference has too, within two points."""
    mine, reference = _trigrams(text), _trigrams(reference_text)
    return bool(mine) and abs(100 * len(mine & reference) / len(mine) - percentage) <= TOLERANCE


def _trigrams(text: Sequence[str]) -> set[tuple[str, str, str]]:
    return set(zip(text, text[1:], text[2:], strict=False))
