"""Whether two mathematical answers are equal, by math-verify. Runs in a verifier process: it may hang or crash."""

from __future__ import annotations

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

EXTRACTION = (LatexExtractionConfig(), ExprExtractionConfig())


def equal(reference: str, answer: str) -> bool | None:
    """Whether `answer` equals `reference` (both as they stand inside a box); None when the reference cannot be read.

    math-verify's own limits are off: they are signal handlers of Python, which a call stuck in C code never runs. The
    owner of this process kills it instead.
    """
    expected = _parse(reference)
    if not expected:
        return None
    return bool(verify(expected, _parse(answer), timeout_seconds=None))


def _parse(answer: str) -> list[object]:
    return parse(f"\\boxed{{{answer}}}", EXTRACTION, parsing_timeout=None)
