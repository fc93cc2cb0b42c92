"""How a constraint is declared, looked up and applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

RELATIONS = ("less than", "at least")

UNCHECKED = {
    "words:start_verb": "it is defined by NLTK's part-of-speech tagger, whose trained model is a download",
    "words:odd_even_syllables": "it is defined by the pronunciation list of the package syllapy",
}
"""Known instructions that are not checked, and why."""


def _as_given(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Kind:
    """What one keyword argument may be, and how it is read."""

    description: str
    accepts: Callable[[Any], bool]
    read: Callable[[Any], Any] = _as_given


def _unlisted(value: Any) -> Any:
    """Some released rows hold a word as a list of one word."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    """Data sets that went through a table format write 3 as 3.0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and float(value).is_integer()


TEXT = Kind("a non-empty string", lambda v: _is_text(_unlisted(v)), _unlisted)
WORD = Kind("a word or phrase", lambda v: _is_text(_unlisted(v)), lambda v: _unlisted(v).strip())
TEXTS = Kind("a non-empty list of strings", lambda v: isinstance(v, list) and bool(v) and all(map(_is_text, v)))
COUNT = Kind("a whole number of at least 0", _is_count, int)
POSITIVE = Kind("a whole number of at least 1", lambda v: _is_count(v) and v >= 1, int)
LETTER = Kind("a single character", lambda v: _is_text(v) and len(v) == 1)
RELATION = Kind(f"one of {RELATIONS}", lambda v: v in RELATIONS)


@dataclass(frozen=True)
class Constraint:
    instruction_id: str
    kinds: Mapping[str, Kind]
    """The keyword arguments; all are needed."""
    follows: Callable[..., bool]
    """(text, **kwargs) -> whether the text follows the instruction."""
    unread: frozenset[str] = frozenset()
    """Arguments that data sets carry and the check does not need."""


CONSTRAINTS: dict[str, Constraint] = {}

Check = Callable[..., bool]


def constraint(instruction_id: str, *, unread: tuple[str, ...] = (), **kinds: Kind) -> Callable[[Check], Check]:
    """Declare a constraint: its public id and the kinds of its keyword arguments."""

    def register(check: Check) -> Check:
        CONSTRAINTS[instruction_id] = Constraint(instruction_id, kinds, check, frozenset(unread))
        return check

    return register


def find_problem(instruction_id: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Why this instruction cannot be checked with these kwargs, in one sentence, or None."""
    if instruction_id in UNCHECKED:
        return f"instruction {instruction_id!r} is not checked here: {UNCHECKED[instruction_id]}; leave the row out"
    known = CONSTRAINTS.get(instruction_id) if isinstance(instruction_id, str) else None
    if known is None:
        return f"instruction {instruction_id!r} is not known{_nearest(str(instruction_id), CONSTRAINTS)}"
    for name in kwargs:
        if name not in known.kinds and name not in known.unread:
            return f"{instruction_id} has no argument {name!r}{_nearest(name, known.kinds)}"
    for name, kind in known.kinds.items():
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
    if not text.strip():
        return False
    known = CONSTRAINTS[instruction_id]
    return known.follows(text, **{name: kind.read(kwargs[name]) for name, kind in known.kinds.items()})


def compare(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold
