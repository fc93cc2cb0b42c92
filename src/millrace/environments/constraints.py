"""Verifiable constraints on a text, by the instruction ids of IFEval (Zhou et al. 2023, arXiv:2311.07911).

A constraint is a pure function of the text and its kwargs. Each one is total (it returns for every string) and takes
time linear in the text, so that no answer of a policy can hang or break the scoring. Language detection is left out:
"in English" of the two case constraints is not checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

RELATIONS = ("less than", "at least")
CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
ABBREVIATIONS = frozenset({"mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "vs.", "e.g.", "i.e.", "etc."})


@dataclass(frozen=True)
class Kind:
    """What one keyword argument may be."""

    description: str
    accepts: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    """Data sets that went through a table format write 3 as 3.0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and float(value).is_integer()


TEXT = Kind("a non-empty string", _is_text)
TEXTS = Kind("a non-empty list of strings", lambda v: isinstance(v, list) and bool(v) and all(map(_is_text, v)))
COUNT = Kind("a whole number of at least 0", _is_count)
POSITIVE = Kind("a whole number of at least 1", lambda v: _is_count(v) and v >= 1)
LETTER = Kind("a single character", lambda v: _is_text(v) and len(v) == 1)
RELATION = Kind(f"one of {RELATIONS}", lambda v: v in RELATIONS)


@dataclass(frozen=True)
class Constraint:
    instruction_id: str
    kinds: Mapping[str, Kind]
    """The keyword arguments; all are needed."""
    follows: Callable[..., bool]
    """(text, **kwargs) -> whether the text follows the instruction."""


CONSTRAINTS: dict[str, Constraint] = {}


def _constraint(instruction_id: str, **kinds: Kind) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def register(follows: Callable[..., bool]) -> Callable[..., bool]:
        CONSTRAINTS[instruction_id] = Constraint(instruction_id, kinds, follows)
        return follows

    return register


def find_problem(instruction_id: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Why this instruction cannot be checked with these kwargs, in one sentence, or None."""
    constraint = CONSTRAINTS.get(instruction_id) if isinstance(instruction_id, str) else None
    if constraint is None:
        return f"instruction {instruction_id!r} is not known{_nearest(str(instruction_id), CONSTRAINTS)}"
    for name in kwargs:
        if name not in constraint.kinds:
            return f"{instruction_id} has no argument {name!r}{_nearest(name, constraint.kinds)}"
    for name, kind in constraint.kinds.items():
        if name not in kwargs:
            return f"{instruction_id} needs the argument {name!r}: {kind.description}"
        if not kind.accepts(kwargs[name]):
            return f"{instruction_id}: {name} must be {kind.description}, not {kwargs[name]!r}"
    return None


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    match = get_close_matches(name, known, n=1)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else "; it takes none"


def follows(text: str, instruction_id: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a text follows one instruction whose kwargs `find_problem` accepts. An empty text follows none."""
    return bool(text.strip()) and CONSTRAINTS[instruction_id].follows(text, **kwargs)


def compare(count: int, relation: str, threshold: float) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def count_sentences(text: str) -> int:
    """Pieces that end in `.`, `!` or `?` before white space or the end; a last piece without one counts too, a known
    abbreviation does not end one."""
    ended, open_words = 0, 0
    for word in text.split():
        open_words += 1
        if word.rstrip("\"')]*_").endswith((".", "!", "?")) and word.lower() not in ABBREVIATIONS:
            ended, open_words = ended + 1, 0
    return ended + (open_words > 0)


def _pieces(text: str, separator: str) -> list[str] | None:
    """The stripped pieces between separators. An empty first or last one is forgiven; an empty inner one gives None."""
    pieces = [piece.strip() for piece in text.split(separator)]
    if pieces and not pieces[0]:
        pieces = pieces[1:]
    if pieces and not pieces[-1]:
        pieces = pieces[:-1]
    return pieces if all(pieces) else None


@_constraint("keywords:existence", keywords=TEXTS)
def _keywords_existence(text: str, keywords: Sequence[str]) -> bool:
    lowered = text.lower()
    return all(keyword.lower() in lowered for keyword in keywords)


@_constraint("keywords:frequency", keyword=TEXT, frequency=COUNT, relation=RELATION)
def _keyword_frequency(text: str, keyword: str, frequency: float, relation: str) -> bool:
    return compare(text.lower().count(keyword.strip().lower()), relation, frequency)


@_constraint("keywords:forbidden_words", forbidden_words=TEXTS)
def _forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """Whole words only: `cat` does not forbid `catalogue`."""
    return not any(re.search(rf"(?<!\w){re.escape(w.strip())}(?!\w)", text, re.IGNORECASE) for w in forbidden_words)


@_constraint("keywords:letter_frequency", letter=LETTER, let_frequency=COUNT, let_relation=RELATION)
def _letter_frequency(text: str, letter: str, let_frequency: float, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


@_constraint("length_constraints:number_words", num_words=COUNT, relation=RELATION)
def _number_words(text: str, num_words: float, relation: str) -> bool:
    return compare(len(words(text)), relation, num_words)


@_constraint("length_constraints:number_sentences", num_sentences=COUNT, relation=RELATION)
def _number_sentences(text: str, num_sentences: float, relation: str) -> bool:
    return compare(count_sentences(text), relation, num_sentences)


@_constraint("length_constraints:number_paragraphs", num_paragraphs=POSITIVE)
def _number_paragraphs(text: str, num_paragraphs: float) -> bool:
    """Paragraphs are separated by the markdown divider ***."""
    paragraphs = _pieces(text, "***")
    return paragraphs is not None and len(paragraphs) == num_paragraphs


@_constraint(
    "length_constraints:nth_paragraph_first_word", num_paragraphs=POSITIVE, nth_paragraph=POSITIVE, first_word=TEXT
)
def _nth_paragraph_first_word(text: str, num_paragraphs: float, nth_paragraph: float, first_word: str) -> bool:
    """Paragraphs are separated by an empty line."""
    paragraphs = [piece.split() for piece in text.split("\n\n") if piece.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    opening = paragraphs[int(nth_paragraph) - 1][0]
    return opening.strip(".,?!'\"").lower() == first_word.strip().lower()


@_constraint("detectable_content:number_placeholders", num_placeholders=COUNT)
def _number_placeholders(text: str, num_placeholders: float) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


@_constraint("detectable_content:postscript", postscript_marker=TEXT)
def _postscript(text: str, postscript_marker: str) -> bool:
    """`P.S.` and `P.P.S` may be written with spaces between the letters."""
    spaced = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    pattern = spaced.get(postscript_marker.strip(), re.escape(postscript_marker.strip().lower()))
    return re.search(pattern, text.lower()) is not None


@_constraint("detectable_format:number_bullet_lists", num_bullets=COUNT)
def _number_bullet_lists(text: str, num_bullets: float) -> bool:
    """Lines that open with `-`, or with a `*` that is not bold type."""
    return sum(_is_bullet(line.strip()) for line in text.splitlines()) == num_bullets


def _is_bullet(line: str) -> bool:
    return line.startswith("-") or (line.startswith("*") and len(line) > 1 and line[1] != "*")


@_constraint("detectable_format:constrained_response")
def _constrained_response(text: str) -> bool:
    return any(answer in text for answer in CONSTRAINED_ANSWERS)


@_constraint("detectable_format:number_highlighted_sections", num_highlights=COUNT)
def _number_highlighted_sections(text: str, num_highlights: float) -> bool:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(section.strip()) for section in single + double) >= num_highlights


@_constraint("detectable_format:multiple_sections", section_spliter=TEXT, num_sections=COUNT)
def _multiple_sections(text: str, section_spliter: str, num_sections: float) -> bool:
    """Sections open with the splitter and a number, as in `SECTION 1`."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


@_constraint("detectable_format:json_format")
def _json_format(text: str) -> bool:
    """The whole text is JSON; a markdown fence around it is forgiven."""
    body = re.sub(r"\A```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(body)
    except (ValueError, RecursionError):  # thousands of opening brackets exhaust the parser's stack
        return False
    return True


@_constraint("detectable_format:title")
def _title(text: str) -> bool:
    """A title in double angular brackets on one line: <<title>>."""
    return any(_has_title(line) for line in text.splitlines())


def _has_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end and bool(line[start:end].strip("<> "))


@_constraint("combination:repeat_prompt", prompt_to_repeat=TEXT)
def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_constraint("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Two different answers separated by six asterisks."""
    answers = _pieces(text, "******")
    return answers is not None and len(answers) == 2 and answers[0] != answers[1]


@_constraint("startend:end_checker", end_phrase=TEXT)
def _end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_constraint("startend:quotation")
def _quotation(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == '"' == stripped[-1]


@_constraint("change_case:english_capital")
def _english_capital(text: str) -> bool:
    return text.isupper()


@_constraint("change_case:english_lowercase")
def _english_lowercase(text: str) -> bool:
    return text.islower()


@_constraint("change_case:capital_word_frequency", capital_frequency=COUNT, capital_relation=RELATION)
def _capital_word_frequency(text: str, capital_frequency: float, capital_relation: str) -> bool:
    return compare(sum(word.isupper() for word in text.split()), capital_relation, capital_frequency)


@_constraint("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text
