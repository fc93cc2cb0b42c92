"""What a run of tests reported of each: read from what pytest and unittest print."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

PYTEST_LINE = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S+::\S.*)$", re.MULTILINE)
UNITTEST_LINE = re.compile(
    r"^(\w+) \(([\w.]+)\)(?:\n([^\n]*?))? \.\.\. (ok|FAIL|ERROR|skipped|expected failure)", re.MULTILINE
)
UNITTEST_NAME = re.compile(r"(\w+) \(([\w.]+)\)")
GOOD = ("passed", "xfail")
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
        found[name] = max(found.get(name, outcome), outcome, key=_badness)
    return found


def _badness(outcome: str) -> int:
    return GOOD.index(outcome) if outcome in GOOD else len(GOOD)


def wrong_tests(outcomes: Mapping[str, str], expected: Mapping[str, str], test_format: str) -> list[str]:
    """Tests that did not come to what they must come to. A test that the report does not name did not run. With
    SWE-bench one that must pass may also fail as its authors expect; R2E takes every outcome at its word."""
    if test_format == "unittest":
        expected = {_unittest_name(name): outcome for name, outcome in expected.items()}
    passes = GOOD if test_format != "r2e" else ("passed",)
    return [
        name
        for name, wanted in expected.items()
        if outcomes.get(name) not in (passes if wanted == "passed" else (wanted,))
    ]


def _pytest(report: str) -> list[tuple[str, str]]:
    """A test whose parameters have blanks in them is also named by what stands before: so do SWE-bench's rows."""
    found = _pytest_lines(report)
    return [*found, *((name.split()[0], outcome) for name, outcome in found if " " in name)]


def _pytest_lines(report: str) -> list[tuple[str, str]]:
    """Behind the name of a test that passed stands nothing more, and so it may have " - " in it."""
    lines = PYTEST_LINE.findall(report)
    return [(name if word == "PASSED" else name.partition(" - ")[0], word.lower()) for word, name in lines]


def _r2e(report: str) -> list[tuple[str, str]]:
    """R2E names a test by what stands behind its file."""
    return [(name.partition("::")[2].replace("::", "."), outcome) for name, outcome in _pytest_lines(report)]


def _unittest(report: str) -> list[tuple[str, str]]:
    """A test with a docstring has its outcome behind the first line of that, by which SWE-bench's rows name it."""
    found = []
    for method, place, said, word in UNITTEST_LINE.findall(report):
        found += [(name, UNITTEST_OUTCOMES[word]) for name in (_unittest_name(f"{method} ({place})"), said) if name]
    return found


def _unittest_name(name: str) -> str:
    """`test_a (tests.test_x.Case)`, as Python writes it before 3.11; later the method stands in the brackets too."""
    match = UNITTEST_NAME.fullmatch(name)
    return name if match is None else f"{match[1]} ({match[2].removesuffix('.' + match[1])})"


FORMATS: Mapping[str, Callable[[str], list[tuple[str, str]]]] = {"pytest": _pytest, "unittest": _unittest, "r2e": _r2e}
