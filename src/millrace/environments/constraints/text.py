"""Words and pieces of a text."""

from __future__ import annotations

import re
import string

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
EDGES = string.punctuation + " "
"""What does not belong to a word at its ends."""


def listed(text: str) -> list[str]:
    """A list of words that is written as a text."""
    return text.split()


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores; `don't` is two."""
    return re.findall(r"\w+", text)


def unpunctuated(text: str) -> str:
    """The text without ASCII punctuation; `don't` becomes `dont`."""
    return text.translate(WITHOUT_PUNCTUATION)


def split_pieces(text: str, separator: str) -> list[str] | None:
    """The stripped pieces between separators. An empty first or last one is forgiven; an empty inner one gives None."""
    pieces = [piece.strip() for piece in text.split(separator)]
    if pieces and not pieces[0]:
        pieces = pieces[1:]
    if pieces and not pieces[-1]:
        pieces = pieces[:-1]
    return pieces if all(pieces) else None
