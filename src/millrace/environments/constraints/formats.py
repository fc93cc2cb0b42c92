"""Marks that a program finds: `detectable_content:` and `detectable_format:`."""

from __future__ import annotations

import json
import re

from millrace.environments.constraints.registry import COUNT, WORD, constraint
from millrace.environments.constraints.sentences import rule_sentences

CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@constraint("detectable_content:number_placeholders", num_placeholders=COUNT)
def _number_placeholders(text: str, num_placeholders: int) -> bool:
    """A placeholder goes from a `[` to the next `]` of its line."""
    return sum(map(_placeholders, text.split("\n"))) >= num_placeholders


def _placeholders(line: str) -> int:
    count, start = 0, line.find("[")
    while start >= 0 and (end := line.find("]", start)) >= 0:
        count, start = count + 1, line.find("[", end)
    return count


@constraint("detectable_content:postscript", postscript_marker=WORD)
def _postscript(text: str, postscript_marker: str) -> bool:
    """`P.S.` and `P.P.S` may be written with spaces between the letters."""
    spaced = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    pattern = spaced.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(pattern, text.lower()) is not None


@constraint("detectable_format:number_bullet_lists", num_bullets=COUNT)
def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Lines that open with `-`, or with a `*` that another character than `*` follows. The line's end is such a
    character, and the line behind a lone `*` then is that bullet's text."""
    lines = [line.lstrip() for line in text.split("\n")]
    dashes = sum(line.startswith("-") for line in lines)
    return dashes + _starred(lines) == num_bullets


def _starred(lines: list[str]) -> int:
    count, is_text = 0, False
    for number, line in enumerate(lines):
        lone = line == "*" and number + 1 < len(lines)
        is_bullet = not is_text and (lone or re.match(r"\*[^*]", line) is not None)
        count += is_bullet
        is_text = is_bullet and lone
    return count


@constraint("detectable_format:constrained_response")
def _constrained_response(text: str) -> bool:
    return any(answer in text for answer in CONSTRAINED_ANSWERS)


@constraint("detectable_format:number_highlighted_sections", num_highlights=COUNT)
def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(section.strip()) for section in single + double) >= num_highlights


@constraint("detectable_format:multiple_sections", section_spliter=WORD, num_sections=COUNT)
def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Sections open with the splitter and a number, as in `SECTION 1`."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


@constraint("detectable_format:json_format")
def _json_format(text: str) -> bool:
    """The whole text is JSON; a markdown fence around it is forgiven."""
    body = re.sub(r"\A```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(body)
    except (ValueError, RecursionError):  # thousands of opening brackets exhaust the parser's stack
        return False
    return True


@constraint("detectable_format:title")
def _title(text: str) -> bool:
    """A title in double angular brackets on one line: <<title>>."""
    return any(map(_has_title, text.split("\n")))


def _has_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end - 2 and bool(line[start : end + 2].lstrip("<").rstrip(">").strip())


@constraint("detectable_format:sentence_hyphens")
def _sentence_hyphens(text: str) -> bool:
    """All sentences are joined by hyphens without spaces."""
    sentences = rule_sentences(text.replace("-", " "))
    return all(piece == sentence for piece, sentence in zip(text.split("-"), sentences, strict=False))


@constraint("detectable_format:square_brackets")
def _square_brackets(text: str) -> bool:
    """Every word stands in square brackets."""
    return all(word.startswith("[") and word.endswith("]") for word in text.split())


@constraint("detectable_format:bigram_wrapping")
def _bigram_wrapping(text: str) -> bool:
    """Every two words stand in double angular brackets: <<I am>> <<at home>>. A last odd word may stand alone."""
    words = text.split()
    pairs = zip(words[::2], words[1::2], strict=False)
    return all(first.startswith("<<") and second.endswith(">>") for first, second in pairs)
