"""Rows of software-engineering problems, in the field's two forms, as tasks.

* SWE-bench, SWE-Gym: `instance_id`, `repo`, `base_commit`, `problem_statement`, `test_patch`, and FAIL_TO_PASS and
  PASS_TO_PASS, lists of tests or such lists as JSON strings.
* R2E: `docker_image`, `problem_statement`, `commit_hash`; `execution_result_content`, JSON with `test_file_names` and
  `test_file_codes`, which are put into r2e_tests/; and `expected_output_json`, what each test should come to.

Both may have `test_command`, and `test_format`: pytest, whose report is read where it has -rA, or unittest with -v.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from millrace.environments.swe.execution import FORMATS

Row = Mapping[str, Any]

PYTEST = "python -m pytest -rA -p no:cacheprovider"
R2E_FOLDER = "r2e_tests"
R2E_COMMAND = f".venv/bin/python -W ignore -m pytest -rA {R2E_FOLDER}"
PATCHED_FILE = re.compile(r"^(?:\+\+\+ b/|--- a/|rename from |rename to )(.+?)\s*$", re.MULTILINE)
WHOLE_FILE = re.compile(r"^diff --git a/(.+) b/\1\s*$", re.MULTILINE)
"""Also one without lines that change: it is empty, or binary."""
LEFT_FILE = re.compile(r"^(?:\+\+\+ b/|rename to )(.+?\.py)\s*$", re.MULTILINE)
"""Of Python, and there behind the patch."""


class SweRowError(ValueError):
    """What is wrong with a row, in a sentence without a subject."""


@dataclass(frozen=True)
class Task:
    instance: str
    problem: str
    repository: str | None
    """Name of the repository among those of the recipe, when the row has no image."""
    commit: str | None
    image: str | None
    test_command: str
    test_format: str
    test_patch: str = ""
    test_files: Mapping[str, str] = field(default_factory=dict)
    """Files of hidden tests, which are written before the tests run."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """What each test must come to."""

    @property
    def hidden(self) -> Sequence[str]:
        """Files whose changes by the policy do not count."""
        patched = PATCHED_FILE.findall(self.test_patch) + WHOLE_FILE.findall(self.test_patch)
        return sorted({*patched, *self.test_files})


def read_task(row: Row) -> Task:
    """Raises SweRowError."""
    if not isinstance(row.get("problem_statement"), str) or not row["problem_statement"].strip():
        raise SweRowError("no problem_statement")
    for name in ("test_command", "test_format", "test_patch"):
        if not isinstance(row.get(name), str | None):
            raise SweRowError(f"{name} that is no text")
    task = _r2e(row) if row.get("execution_result_content") is not None else _swe_bench(row)
    if task.test_format not in FORMATS:
        raise SweRowError(f"test_format {task.test_format!r}; it must be {' or '.join(FORMATS)}")
    if not task.expected:
        raise SweRowError("no test whose outcome decides")
    return task


def _swe_bench(row: Row) -> Task:
    for name in ("instance_id", "repo", "base_commit"):
        if not isinstance(row.get(name), str) or not row[name]:
            raise SweRowError(f"no {name}; a row is either like SWE-bench's or has execution_result_content (R2E)")
    named = [*_names(row, "FAIL_TO_PASS", least=1), *_names(row, "PASS_TO_PASS", least=0)]
    patch = row.get("test_patch") or ""
    tests = map(shlex.quote, dict.fromkeys(LEFT_FILE.findall(patch)))
    return Task(
        instance=row["instance_id"],
        problem=row["problem_statement"],
        repository=row["repo"],
        commit=row["base_commit"],
        image=row.get("docker_image"),
        test_command=row.get("test_command") or " ".join([PYTEST, *tests]),
        test_format=row.get("test_format") or "pytest",
        test_patch=patch,
        expected=dict.fromkeys(named, "passed"),
    )


def _r2e(row: Row) -> Task:
    content, expected = _json(row, "execution_result_content"), _json(row, "expected_output_json")
    names, codes = content.get("test_file_names"), content.get("test_file_codes")
    if not _are_texts(names) or not _are_texts(codes) or len(names) != len(codes):
        raise SweRowError("execution_result_content without test_file_names and test_file_codes of one length")
    if any("/" in name or name.startswith(".") for name in names):
        raise SweRowError("execution_result_content with a test file that is not a plain name")
    if not isinstance(row.get("docker_image"), str):
        raise SweRowError("no docker_image, which an R2E row's repository lies in")
    return Task(
        instance=str(row.get("instance_id") or row["docker_image"]),
        problem=row["problem_statement"],
        repository=None,
        commit=None,
        image=row["docker_image"],
        test_command=row.get("test_command") or R2E_COMMAND,
        test_format="r2e",
        test_files={f"{R2E_FOLDER}/{name}": code for name, code in zip(names, codes, strict=True)},
        expected={str(name): str(outcome).lower() for name, outcome in expected.items()},
    )


def _names(row: Row, key: str, *, least: int) -> list[str]:
    value = row.get(key, [])
    try:
        names = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        names = None
    if not _are_texts(names) or len(names) < least:
        raise SweRowError(f"{key} that is no list of {'at least one test' if least else 'tests'}")
    return names


def _json(row: Row, key: str) -> Mapping[str, Any]:
    value = row.get(key)
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        read = None
    if not isinstance(read, Mapping):
        raise SweRowError(f"no {key}, which must be an object or one as JSON")
    return read


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
