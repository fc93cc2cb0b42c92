"""How many words, sentences and paragraphs: `length_constraints:` and `paragraphs:`."""

from __future__ import annotations

import re

from millrace.environments.constraints.registry import COUNT, POSITIVE, RELATION, WORD, compare, constraint
from millrace.environments.constraints.sentences import punkt_sentences
from millrace.environments.constraints.text import split_pieces, words


@constraint("length_constraints:number_words", num_words=COUNT, relation=RELATION)
def _number_words(text: str, num_words: int, relation: str) -> bool:
    return compare(len(words(text)), relation, num_words)


@constraint("length_constraints:number_sentences", num_sentences=COUNT, relation=RELATION)
def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compare(len(punkt_sentences(text)), relation, num_sentences)


@constraint("length_constraints:number_paragraphs", num_paragraphs=COUNT)
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by the markdown divider ***."""
    paragraphs = split_pieces(text, "***")
    return paragraphs is not None and len(paragraphs) == num_paragraphs


@constraint("paragraphs:paragraphs")
def _two_divided_paragraphs(text: str) -> bool:
    return _number_paragraphs(text, 2)


@constraint("paragraphs:paragraphs2")
def _two_spaced_paragraphs(text: str) -> bool:
    """Two paragraphs, separated by an empty line."""
    paragraphs = split_pieces(text, "\n\n")
    return paragraphs is not None and len(paragraphs) == 2


@constraint(
    "length_constraints:nth_paragraph_first_word", num_paragraphs=POSITIVE, nth_paragraph=POSITIVE, first_word=WORD
)
def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line. Empty ones do not count for their number, but they do for the place of
    the nth, which is how IFEval has it."""
    paragraphs = text.split("\n\n")
    if sum(bool(paragraph.strip()) for paragraph in paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    opening = paragraphs[nth_paragraph - 1].split()
    if not opening:
        return False
    word = re.split(r"[.,?!'\"]", opening[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return word.lower() == first_word.lower()
