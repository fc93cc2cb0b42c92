"""What choice an answer makes, by the grading modes of NeMo-Gym's `mcqa` server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from millrace.environments.answer import last_boxed

Options = Mapping[str, str]
"""The options' texts by upper-case letter."""

STRICT, LENIENT_BOX = "strict_single_letter_boxed", "lenient_boxed"
LENIENT_COLON, LENIENT_MARKDOWN = "lenient_answer_colon", "lenient_answer_colon_md"
GRADING_MODES = (STRICT, LENIENT_BOX, LENIENT_COLON, LENIENT_MARKDOWN)

MOST_WRAPPERS = 10
"""`\\text{}` around an answer that are taken off."""

ONLY_LETTER = re.compile(r"[^A-Za-z]*([A-Z])[^A-Za-z]*")
LABEL = re.compile(r"\s*([A-Z])\s*[:).\-]")
COLON = re.compile(r"answer\s*:\s*(.+)", re.IGNORECASE)
MARKDOWN_COLON = re.compile(r"[*_]{0,2}Answer[*_]{0,2}\s*:[*_\s]{0,2}(.+)", re.IGNORECASE)
LETTER = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
OPENING_LETTER = re.compile(r"[A-Za-z](?![A-Za-z0-9])")
CAPITAL = re.compile(r"\b[A-Z]\b")
LIST_GAP = re.compile(r"\s*[/|&,;]\s*|\s+(?:or|and)\s+|\s+", re.IGNORECASE)

OTHER_LETTERS = str.maketrans(
    {
        letter: f" {latin}"
        for latin, letters in zip("ABCD", ("أঅＡ", "بবＢ", "جডＣ", "دঢＤ"), strict=True)
        for letter in letters
    }
)
"""Arabic, Bengali and full-width letters of options."""


def last_matches(patterns: Sequence[str], text: str) -> list[str | None]:
    """The last match of each pattern, in any case: its group, or all of it when it has none. Runs in a verifier
    process: a pattern of the data may take forever."""
    found = (re.findall(pattern, text, re.IGNORECASE) for pattern in patterns)
    return [matches[-1] if matches else None for matches in found]


def read_match(match: str | None, options: Options) -> str | None:
    """The choice that a pattern's match makes: a letter, which is believed, or an option's whole text."""
    if match is None:
        return None
    answer = _latin(match.strip()).upper()
    return answer if len(answer) == 1 and answer.isalpha() else _option_with_text(answer, options)


def read_choice(text: str, options: Options, mode: str) -> str | None:
    """The letter of the option that a text chooses, or None."""
    match mode:
        case "lenient_answer_colon":
            return _after_colon(text, options)
        case "lenient_answer_colon_md":
            payloads = (found.group(1) for found in MARKDOWN_COLON.finditer(text))
            return next((c for payload in reversed(list(payloads)) if (c := _chosen_letter(payload, options))), None)
    box = last_boxed(text)
    if box is None:
        return None
    return _letter_in_box(box, options) or (_text_in_box(box, options) if mode == LENIENT_BOX else None)


def _letter_in_box(box: str, options: Options) -> str | None:
    inner = _unwrapped(box.strip())
    found = ONLY_LETTER.fullmatch(inner) or LABEL.match(inner)
    return found.group(1) if found and found.group(1) in options else None


def _text_in_box(box: str, options: Options) -> str | None:
    """The option whose text stands in the box, when it is the only one."""
    inner = [_normal(text) for text in (box, _unwrapped(box.strip()))]
    chosen = {
        letter for letter, text in options.items() if _normal(text) and any(_normal(text) in one for one in inner)
    }
    return chosen.pop() if len(chosen) == 1 else None


def _after_colon(text: str, options: Options) -> str | None:
    found = COLON.search(text)
    if found is None:
        return None
    answer = _unwrapped(found.group(1)).strip()
    return answer.upper() if answer.upper() in options else _option_with_text(answer, options)


def _chosen_letter(payload: str, options: Options) -> str | None:
    """The letter that opens what stands behind `Answer:`, or else the last capital that stands alone; None where
    several choices stand side by side."""
    answer = _latin(payload).strip().strip("*_` \t\n\r.,;:")
    if _lists_choices(answer, options):
        return None
    capitals = CAPITAL.findall(answer)
    opening = OPENING_LETTER.match(answer)
    letter = opening.group() if opening else capitals[-1] if capitals else ""
    return letter.upper() if letter.upper() in options else None


def _lists_choices(answer: str, options: Options) -> bool:
    letters = [found for found in LETTER.finditer(answer) if found.group().upper() in options]
    return any(
        a.group().upper() != b.group().upper() and LIST_GAP.fullmatch(answer[a.end() : b.start()])
        for a, b in pairwise(letters)
    )


def _option_with_text(answer: str, options: Options) -> str | None:
    return next((letter for letter, text in options.items() if _normal(text) == _normal(answer)), None)


def _unwrapped(latex: str) -> str:
    """Without the `\\text{}` around it."""
    for _ in range(MOST_WRAPPERS):
        if latex.startswith("\\text{") and latex.endswith("}"):
            latex = latex[len("\\text{") : -1].strip()
    return latex


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _latin(text: str) -> str:
    return text.translate(OTHER_LETTERS).strip()
