"""Whether what a program gave is what was expected: decided out here, strict in type and form."""

from __future__ import annotations

import json
import math
import re
from typing import Any

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""Python itself reads more as a number: 1_0, nan."""


class NotOneValueError(ValueError):
    """Text that is not exactly one value in JSON."""


def same_text(given: str, expected: str, tolerance: float | None = None) -> bool:
    """Line by line; blanks at the end of a line and empty lines at the end do not count. With a `tolerance` words that
    are numbers may differ by it, absolutely or relative to the expected one."""
    ours, theirs = _lines(given), _lines(expected)
    if ours == theirs:
        return True
    if tolerance is None or len(ours) != len(theirs):
        return False
    pairs = [(a.split(), b.split()) for a, b in zip(ours, theirs, strict=True)]
    return all(
        len(a) == len(b) and all(_same_word(x, y, tolerance) for x, y in zip(a, b, strict=True)) for a, b in pairs
    )


def same_value(given: Any, expected: Any, tolerance: float | None = None) -> bool:
    """Equal JSON values of equal types: True is not 1, and 5.0 is not 5. Lists are compared element by element, however
    deep they lie in one another."""
    pairs = [(given, expected)]
    while pairs:
        ours, theirs = pairs.pop()
        if type(ours) is not type(theirs):
            return False
        if isinstance(theirs, dict):
            if ours.keys() != theirs.keys():
                return False
            pairs += [(ours[key], theirs[key]) for key in theirs]
        elif isinstance(theirs, list):
            if len(ours) != len(theirs):
                return False
            pairs += zip(ours, theirs, strict=True)
        elif ours != theirs and not (
            isinstance(theirs, float) and tolerance is not None and _close(ours, theirs, tolerance)
        ):
            return False
    return True


def read_value(text: bytes | str) -> Any:
    """The one JSON value of a text. Raises NotOneValueError: none, several, NaN, a repeated key, too deep, or more
    digits in an integer than Python reads."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise NotOneValueError(f"not one JSON value: {error}") from None


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_word(given: str, expected: str, tolerance: float) -> bool:
    if given == expected:
        return True
    numbers = NUMBER.fullmatch(given) and NUMBER.fullmatch(expected)
    return bool(numbers) and _close(float(given), float(expected), tolerance)


def _close(given: float, expected: float, tolerance: float) -> bool:
    return math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that stands twice in an object")
    return found
