"""What a run of tests reported of each: read from what pytest and unittest print."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

PYTEST_LINE = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S+::\S.*?)(?: - .*)?$", re.MULTILINE)
UNITTEST_LINE = re.compile(
    r"^(\w+) \(([\w.]+)\)(?:\n[^\n]*?)? \.\.\. (ok|FAIL|ERROR|skipped|expected failure)", re.MULTILINE
)
UNITTEST_NAME = re.compile(r"(\w+) \(([\w.]+)\)")
UNITTEST_OUTCOMES = {
    "ok": "passed",
    "FAIL": "failed",
    "ERROR": "error",
    "skipped": "skipped",
    "expected failure": "xfail",
}


def read_outcomes(report: str, test_format: str) -> dict[str, str]:
    """`passed`, `failed`, `error`, ... for each test that the report names; of one named twice the worse counts."""
    found: dict[str, str] = {}
    for name, outcome in FORMATS[test_format](report):
        if found.get(name, "passed") == "passed":
            found[name] = outcome
    return found


def wrong_tests(outcomes: Mapping[str, str], expected: Mapping[str, str], test_format: str) -> list[str]:
    """Tests that did not come to what they must come to. A test that the report does not name did not run."""
    if test_format == "unittest":
        expected = {_unittest_name(name): outcome for name, outcome in expected.items()}
    return [name for name, outcome in expected.items() if outcomes.get(name) != outcome]


def _pytest(report: str) -> list[tuple[str, str]]:
    return [(name, outcome.lower()) for outcome, name in PYTEST_LINE.findall(report)]


def _r2e(report: str) -> list[tuple[str, str]]:
    """R2E names a test by what stands behind its file."""
    return [(name.partition("::")[2].replace("::", "."), outcome) for name, outcome in _pytest(report)]


def _unittest(report: str) -> list[tuple[str, str]]:
    lines = UNITTEST_LINE.findall(report)
    return [(_unittest_name(f"{method} ({place})"), UNITTEST_OUTCOMES[word]) for method, place, word in lines]


def _unittest_name(name: str) -> str:
    """`test_a (tests.test_x.Case)`, as Python writes it before 3.11; later the method stands in the brackets too."""
    match = UNITTEST_NAME.fullmatch(name)
    return name if match is None else f"{match[1]} ({match[2].removesuffix('.' + match[1])})"


FORMATS: Mapping[str, Callable[[str], list[tuple[str, str]]]] = {"pytest": _pytest, "unittest": _unittest, "r2e": _r2e}
