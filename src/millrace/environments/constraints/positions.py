"""What opens and closes a text or its sentences: `startend:`, `first_word:`, `last_word:` and kin."""

from __future__ import annotations

import re

from millrace.environments.constraints.registry import POSITIVE, WORD, constraint
from millrace.environments.constraints.sentences import punkt_sentences, rule_sentences
from millrace.environments.constraints.tokens import sentence_tokens, tokens


@constraint("startend:end_checker", end_phrase=WORD)
def _end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.lower())


@constraint("startend:quotation")
def _quotation(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == '"' == stripped[-1]


@constraint("keywords:start_end")
def _start_end(text: str) -> bool:
    """The first and the last token are the same word; a mark behind the last word is a token of its own."""
    found = tokens(text)
    return len(found) >= 2 and found[0].lower() == found[-1].lower()


@constraint("first_word:first_word_answer", first_word=WORD)
def _first_word_answer(text: str, first_word: str) -> bool:
    """With what stands at the word: `Well,` is not `well`."""
    return text.split()[0].lower() == first_word.lower()


@constraint("first_word:first_word_sent", first_word=WORD)
def _first_word_sentence(text: str, first_word: str) -> bool:
    return all(_at(sentence, 0).lower() == first_word.lower() for sentence in rule_sentences(text))


@constraint("last_word:last_word_answer", last_word=WORD)
def _last_word_answer(text: str, last_word: str) -> bool:
    """Marks at the word do not count."""
    return _unmarked(text.split()[-1]) == last_word.lower()


@constraint("last_word:last_word_sent", last_word=WORD)
def _last_word_sentence(text: str, last_word: str) -> bool:
    return all(_unmarked(_at(sentence, -1)) == last_word.lower() for sentence in rule_sentences(text))


def _at(sentence: str, place: int) -> str:
    return sentence.split()[place] if sentence else ""


def _unmarked(word: str) -> str:
    return re.sub(r"[^\w\s]", "", word).lower()


@constraint("keywords:keyword_specific_position", keyword=WORD, n=POSITIVE, m=POSITIVE)
def _keyword_position(text: str, keyword: str, n: int, m: int) -> bool:
    """The keyword, in its own case, is the m-th token of the n-th sentence; marks are tokens too."""
    sentences = rule_sentences(text)
    return len(sentences) >= n and tokens(sentences[n - 1])[m - 1 : m] == [keyword]


@constraint("words:keywords_specific_position", keyword=WORD, n=POSITIVE, m=POSITIVE)
def _keyword_word_position(text: str, keyword: str, n: int, m: int) -> bool:
    """The keyword, in any case, is the m-th word of the n-th sentence; marks are not counted."""
    sentences = punkt_sentences(text)
    if len(sentences) < n:
        return False
    found = [token for token in sentence_tokens(sentences[n - 1]) if any(map(str.isalnum, token))]
    return [word.lower() for word in found[m - 1 : m]] == [keyword.lower()]


@constraint("words:words_position", keyword=WORD)
def _second_and_second_to_last(text: str, keyword: str) -> bool:
    """The second and the second to last token; a mark at the end is not counted."""
    found = [token.lower() for token in tokens(text)]
    if len(found[-1]) == 1 and re.fullmatch(r"[!-/:-@\[-`{-~]", found[-1]):
        found = [*found[:-1], ""][:-1] if len(found) >= 3 else []
    return len(found) >= 2 and found[1] == found[-2] == keyword.lower()
