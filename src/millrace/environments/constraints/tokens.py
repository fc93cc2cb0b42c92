"""Tokens in the manner of the Penn Treebank, as NLTK's `word_tokenize` makes them: punctuation stands alone, `don't` is
`do` and `n't`, and only the last period of a sentence is cut off."""

from __future__ import annotations

import re
from collections.abc import Iterator

from millrace.environments.constraints.sentences import punkt_sentences

PIECE = re.compile(
    r"""\.{2,} | -- | '' | ``? | [;@#$%&?!*()\[\]{}<>"«»“”„‘’\u2012-\u2015] | [:,](?!\d)
    | (?: [^\s;@#$%&?!*()\[\]{}<>"«»“”„‘’`\u2012-\u2015.:,'-] | \.(?!\.) | [:,](?=\d) | -(?!-) | '(?!') )+""",
    re.VERBOSE,
)
FINAL_PERIOD = re.compile(r"(?<=[^.])\.(?=[\])}>\"'»”’]*\Z)")
OPENING_QUOTE = re.compile(r"'(?!(?:re|ve|ll|[mtsdn])\b)(?=\w)", re.IGNORECASE)
CLITIC = re.compile(r"(?<=[^'])(?:'[sSmMdD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T|')\Z")
JOINED = re.compile(
    r"\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(more)('n)\b|\b(wan)(na)\Z",
    re.I,
)


def tokens(text: str) -> list[str]:
    """The tokens of a text, sentence by sentence. An opening double quotation mark becomes ``, a closing one ''."""
    return [token for sentence in punkt_sentences(text) for token in sentence_tokens(sentence)]


def sentence_tokens(sentence: str) -> list[str]:
    sentence = FINAL_PERIOD.sub(" .", sentence.rstrip())
    chunks = re.finditer(r"(\A|.)(?<!\S)(\S+)", sentence, re.DOTALL)
    return [token for chunk in chunks for token in _chunk_tokens(*chunk.groups())]


def _chunk_tokens(before: str, chunk: str) -> Iterator[str]:
    """The tokens of a run without white space, given the character before it."""
    for match in PIECE.finditer(chunk):
        piece = match.group()
        if piece == '"':
            yield "``" if before in ("", " ", "(", "[", "{", "<") else "''"
        elif piece[0] in "'.:,-" or piece[0].isalnum() or piece[0] not in ";@#$%&?!*()[]{}<>«»“”„‘’`":
            yield from _word_tokens(piece)
        else:
            yield piece
        before = piece


def _word_tokens(word: str) -> Iterator[str]:
    if OPENING_QUOTE.match(word):
        yield "'"
        word = word[1:]
    clitic = CLITIC.search(word)
    ending = ""
    if clitic:
        word, ending = word[: clitic.start()], clitic.group()
    joined = JOINED.search(word)
    if joined:
        parts = [group for group in joined.groups() if group]
        word = word[: joined.start()] + " " + " ".join(parts) + " " + word[joined.end() :]
    yield from word.split()
    if ending:
        yield ending
