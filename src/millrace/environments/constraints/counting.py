"""Words, numbers, names and marks that are counted: `count:`."""

from __future__ import annotations

import re

from millrace.environments.constraints.keywords import occurrences
from millrace.environments.constraints.registry import COUNT, POSITIVE, WORD, constraint
from millrace.environments.constraints.sentences import rule_sentences
from millrace.environments.constraints.text import EDGES, listed, unpunctuated, words
from millrace.environments.constraints.tokens import tokens

CONJUNCTIONS = frozenset({"and", "but", "for", "nor", "or", "so", "yet"})

NAMES = listed(
    """
    Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin
    Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan
    Victoria Elijah Layla Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph
    Claire Ryan Stella Jonathan
    """
)
"""The names that the instruction lists."""

PRONOUNS = frozenset(
    listed(
        """
    i me we us you he him she her it they them my mine our ours your yours his hers its their theirs myself
    ourselves yourself yourselves himself herself itself themselves this that these those who whom whose which
    what whoever whomever whatever whichever anybody anyone anything everybody everyone everything nobody
    nothing somebody someone something each either neither both all some any none
    """
    )
)

JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


@constraint("count:lowercase_counting", N=COUNT)
def _lowercase_words(text: str, N: int) -> bool:
    """At most N words of lower-case letters a to z in all, whichever they are."""
    return len(re.findall(r"\b[a-z]+\b", text)) <= N


@constraint("count:count_unique")
def _unique_tokens(text: str) -> bool:
    """No token comes twice; marks are tokens, and so a text has one period at most."""
    found = tokens(text)
    return len(found) == len(set(found))


@constraint("count:count_increment_word", keyword1=WORD, keyword2=WORD)
def _increment_word(text: str, keyword1: str, keyword2: str) -> bool:
    return occurrences(text, keyword1) == 1 and occurrences(text, keyword2) == 2


@constraint("count:counting_composition", n_sent=POSITIVE, n_words=POSITIVE)
def _counting_composition(text: str, n_sent: int, n_words: int) -> bool:
    """Three paragraphs between dividers ***, each of n_sent sentences of n_words tokens; marks are tokens too."""
    paragraphs = text.split("***")
    return len(paragraphs) == 3 and all(_is_composed(paragraph, n_sent, n_words) for paragraph in paragraphs)


def _is_composed(paragraph: str, n_sent: int, n_words: int) -> bool:
    sentences = rule_sentences(paragraph)
    return len(sentences) == n_sent and all(len(tokens(sentence)) == n_words for sentence in sentences)


@constraint("count:word_count_range", min_words=COUNT, max_words=COUNT)
def _word_range(text: str, min_words: int, max_words: int) -> bool:
    return min_words <= len(words(text)) <= max_words


@constraint("count:unique_word_count", N=COUNT)
def _unique_words(text: str, N: int) -> bool:
    return len({word.strip(EDGES) for word in text.lower().split()}) >= N


@constraint("count:conjunctions", small_n=COUNT)
def _conjunctions(text: str, small_n: int) -> bool:
    """So many different ones; `And` and `and` count as two, and so do `and` and `and,`."""
    return len({word for word in text.split() if word.strip(EDGES).lower() in CONJUNCTIONS}) >= small_n


@constraint("count:person_names", N=COUNT)
def _person_names(text: str, N: int) -> bool:
    return sum(re.search(rf"\b{name}\b", text) is not None for name in NAMES) >= N


@constraint("count:numbers", N=COUNT)
def _numbers(text: str, N: int) -> bool:
    """Without punctuation, so that 1,000.5 is one number."""
    return len(re.findall(r"\d+", unpunctuated(text))) == N


@constraint("count:punctuation")
def _every_mark(text: str) -> bool:
    """An interrobang and, apart from the first one, each of `. , ! ? ; :`."""
    if not any(mark in text for mark in ("?!", "!?", "‽")):
        return False
    rest = text.replace("?!", "", 1) if "?!" in text else text.replace("!?", "", 1)
    return set(".,!?;:") <= set(rest)


@constraint("count:pronouns", N=COUNT)
def _pronouns(text: str, N: int) -> bool:
    return sum(token in PRONOUNS for token in tokens(text.replace("/", " ").lower())) >= N


@constraint("count:words_japanese", N=POSITIVE)
def _japanese_words(text: str, N: int) -> bool:
    """Every N-th word has a kana or a Chinese character; numbers and lone marks are forgiven."""
    every = [word.strip(EDGES) for word in text.split()[N - 1 :: N]]
    return all(JAPANESE.search(word) for word in every if word and not word.isdigit())


@constraint("count:keywords_multiple", keyword1=WORD, keyword2=WORD, keyword3=WORD, keyword4=WORD, keyword5=WORD)
def _keywords_multiple(text: str, **keywords: str) -> bool:
    return all(occurrences(text, keywords[f"keyword{i}"]) == n for i, n in enumerate((1, 2, 3, 5, 7), start=1))
