"""How a text is laid out: `format:`."""

from __future__ import annotations

import re
import string
from itertools import pairwise

import regex

from millrace.environments.constraints.registry import TEXT, constraint
from millrace.environments.constraints.sentences import punkt_sentences
from millrace.environments.constraints.text import EDGES, unpunctuated
from millrace.environments.constraints.tokens import tokens

BRACKETS = {")": "(", "]": "[", "}": "{"}
DEEP_BRACKETS = 5
DEEP_QUOTES = 3
LETTERED_OPTIONS = re.compile(r"\W*[aA]\W*[bB]\W*[cC]\W*")
EMOJI = regex.compile(r"\p{Emoji}(?<![0-9#*\U0001f1e6-\U0001f1ff])")
"""One character that is an emoji by itself; digits and the letters of flags are only parts of one."""
TEMPLATE = ("My Answer:", "My Conclusion:", "Future Outlook:")


@constraint("format:parentheses")
def _nested_brackets(text: str) -> bool:
    """Brackets nest five deep and the innermost one closes. A bracket that closes none starts the count anew."""
    opened: list[str] = []
    deepest = 0
    for char in text:
        if char in "([{":
            opened.append(char)
            deepest = max(deepest, len(opened))
        elif char in BRACKETS:
            if not opened or opened.pop() != BRACKETS[char]:
                opened, deepest = [], 0
            elif deepest >= DEEP_BRACKETS:
                return True
    return False


@constraint("format:quotes")
def _nested_quotes(text: str) -> bool:
    """Straight double and single quotation marks nest three deep; an apostrophe counts as a single one."""
    opened: list[str] = []
    deepest = 0
    for char in text:
        if opened and char == opened[-1]:
            opened.pop()
            if deepest - len(opened) >= DEEP_QUOTES:
                return True
        elif char in "\"'":
            opened.append(char)
            deepest = max(deepest, len(opened))
    return False


@constraint("format:options", options=TEXT)
def _options(text: str, options: str) -> bool:
    """The answer is one of the options, which are separated by `/`, else by `or`, else by commas. Lettered options must
    be given as they are written; of others neither case nor marks around them count."""
    separator = "/" if "/" in options else "or" if "or" in options else ","
    choices = [option.strip() for option in options.split(separator)]
    if LETTERED_OPTIONS.match(options):
        return text in choices
    return text.strip(EDGES).lower() in {choice.strip(EDGES).lower() for choice in choices}


@constraint("format:newline")
def _word_a_line(text: str) -> bool:
    stripped = unpunctuated(text).strip()
    return sum(line != "" for line in stripped.split("\n")) == len(stripped.split())


@constraint("format:emoji")
def _emoji_sentences(text: str) -> bool:
    """Each sentence has an emoji as one of its last two characters, or the next one begins with it."""
    sentences = [unpunctuated(sentence).strip() for sentence in punkt_sentences(text)]
    followers = [*sentences[1:], ""]
    return all(
        sentence and (EMOJI.search(sentence[-2:]) or EMOJI.match(follower))
        for sentence, follower in zip(sentences, followers, strict=True)
    )


@constraint("format:line_indent")
def _stairs(text: str) -> bool:
    """Each line is indented deeper than the one before; empty ones do not count."""
    indents = [len(line) - len(line.lstrip(" ")) for line in text.split("\n") if line.strip()]
    return all(deeper > less for less, deeper in pairwise(indents))


@constraint("format:quote_unquote")
def _quotes_explained(text: str) -> bool:
    """No quotation follows another one, and none ends the text."""
    joined = "".join(text.replace("“", '"').replace("”", '"').replace("'\"'", "").split())
    ending = joined.rstrip(string.digits + string.punctuation.replace('"', ""))
    return '""' not in joined and not ending.endswith('"')


@constraint("format:list", sep=TEXT)
def _list(text: str, sep: str) -> bool:
    """The sign that stands for a bullet comes twice."""
    return text.count(sep) >= 2


@constraint("format:thesis")
def _thesis(text: str) -> bool:
    """HTML italics with something in them, and something behind them."""
    start = text.find("<i>") if "<i>" in text else text.find("<em>")
    if start < 0:
        return False
    rest = text[start:]
    end = rest.find("</i>") if "</i>" in rest else rest.find("</em>")
    return end >= 0 and bool(rest[len("<i>") : end].strip()) and bool(rest[end + len("</i>") :].strip())


@constraint("format:sub-bullets")
def _sub_bullets(text: str) -> bool:
    """A `-` stands behind each `*`."""
    return all("-" in bullet for bullet in text.split("*")[1:])


@constraint("format:no_bullets_bullets")
def _sentences_then_bullets(text: str) -> bool:
    """At least two sentences, then at least two lines that open with `*`, and nothing else. Behind an empty line only
    bullets may follow."""
    sentences, bullets, writing = 0, 0, True
    for line in map(str.strip, text.split("\n")):
        if line.startswith("*"):
            if sentences < 2:
                return False
            writing, bullets = False, bullets + 1
        elif writing:
            found = len(punkt_sentences(line))
            writing, sentences = found > 0, sentences + found
        else:
            return False
    return bullets >= 2


@constraint("format:title_case")
def _title_case(text: str) -> bool:
    """No token is of lower-case letters, or of capitals behind a small one."""
    return not any(map(_breaks_title_case, tokens(text)))


def _breaks_title_case(token: str) -> bool:
    rest = token[1:]
    return token[0].isalpha() and token[0].islower() and (not rest or rest.isupper() or rest.islower())


@constraint("format:output_template")
def _output_template(text: str) -> bool:
    return all(part in text for part in TEMPLATE)


@constraint("format:no_whitespace")
def _no_whitespace(text: str) -> bool:
    return not any(map(str.isspace, text))
