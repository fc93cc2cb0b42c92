"""Programs in Python and C++, judged by hidden tests in a sandbox.

The program is the last fenced block of the final text in a language that the recipe and the row allow. It is run on
each test by itself, with its input on standard input, or a function of it is called; what it gives is compared outside
the sandbox. Reward 1 when all tests pass, else 0, or with `grading: fraction` the share that passes; masked when the
sandbox can give no verdict. `code_rows` says what rows look like.

A row's own `time_limit_s` (of processor time), `memory_limit_mb` and `tolerance` (of numbers in the output) go before
the recipe's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from millrace.config.schema import SandboxConfig
from millrace.config.stage_rules import LEAST_PROGRAM_MB, MOST_PROGRAM_MB
from millrace.environments.answer import final_text
from millrace.environments.base import Message, Reward
from millrace.environments.code_rows import CodeRowError, Problem, opening, opening_problem, read_problem
from millrace.environments.sandbox.cpp import compiler_limits
from millrace.environments.sandbox.remote import VerifierServer
from millrace.environments.sandbox.run import CppProgram, Limits, Program
from millrace.environments.sandbox.service import CodeVerifier, Outcome, SandboxError

Language = Literal["python", "cpp"]

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)([^\n]*)$", re.MULTILINE)
TAGS: Mapping[str, Language] = {
    "python": "python", "python3": "python", "py": "python",
    "cpp": "cpp", "c++": "cpp", "cxx": "cpp", "cc": "cpp",
}  # fmt: skip

LONGEST_PROGRAM = 200_000
"""Characters of a program that is still run."""
RECENT_ROWS = 16
"""Rows whose tests are kept unpacked."""


class CodeEnvironment:
    required_fields: Sequence[str] = ()

    def __init__(
        self,
        config: SandboxConfig,
        *,
        grading: Literal["binary", "fraction"],
        servers: Sequence[VerifierServer] = (),
    ) -> None:
        self.verifier = CodeVerifier(
            tier=config.tier,
            workers=config.workers,
            compiler=_compiler_limits(config) if "cpp" in config.languages else None,
            tests_per_process=config.tests_per_process,
            servers=servers,
        )
        self._config, self._fraction = config, grading == "fraction"
        self._recent: dict[int, tuple[Mapping[str, Any], Problem]] = {}

    def validate(self, row: Mapping[str, Any]) -> str | None:
        try:
            problem = read_problem(row)
        except CodeRowError as error:
            return f"the row has {error}"
        return self._language_problem(row, problem) or _own_limits_problem(row) or opening_problem(row)

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        problem = self._problem(row)
        return opening(row, problem.function, self._languages(row, problem))

    async def step(self, row: Mapping[str, Any], transcript: Sequence[Message], answer: str) -> Reward:
        problem = self._problem(row)
        found = last_program(final_text(answer), self._languages(row, problem))
        if found is None:
            return _not_run("no program in a fenced block", self.verifier.tier)
        source, language = found
        if len(source) > LONGEST_PROGRAM:
            return _not_run("program too long", self.verifier.tier)
        try:
            outcome = await self.verifier.verify(
                CppProgram(source) if language == "cpp" else Program(source, problem.function),
                problem.cases,
                self._limits(row),
                every=self._fraction,
                tolerance=row.get("tolerance"),
            )
        except SandboxError as error:
            return Reward(0.0, f"no verdict: {error}", {f"sandbox_{self.verifier.tier}": 1.0}, masked=True)
        value = outcome.passed / outcome.tests if self._fraction else float(outcome.passed == outcome.tests)
        return Reward(value, outcome.failure or "all tests passed", _details(outcome))

    def summary(self) -> str:
        return self.verifier.summary()

    async def close(self) -> None:
        await self.verifier.close()

    def _languages(self, row: Mapping[str, Any], problem: Problem) -> list[Language]:
        """What a row's program may be written in."""
        allowed = [each for each in self._config.languages if row.get("language") in (None, each)]
        return allowed if problem.function is None else [each for each in allowed if each == "python"]

    def _language_problem(self, row: Mapping[str, Any], problem: Problem) -> str | None:
        wanted = row.get("language")
        if wanted is not None and wanted not in self._config.languages:
            return f"its language is {wanted!r}, and sandbox.languages allows {', '.join(self._config.languages)}"
        if not self._languages(row, problem):
            return "its function is called in Python, and only C++ is allowed; see its language and sandbox.languages"
        return None

    def _problem(self, row: Mapping[str, Any]) -> Problem:
        """The row's tests, unpacked once for the answers of a group: they may be many megabytes."""
        known = self._recent.get(id(row))
        if known is not None and known[0] is row:
            return known[1]
        problem = read_problem(row)
        self._recent[id(row)] = (row, problem)
        while len(self._recent) > RECENT_ROWS:
            del self._recent[next(iter(self._recent))]
        return problem

    def _limits(self, row: Mapping[str, Any]) -> Limits:
        cpu_s = row.get("time_limit_s") or self._config.cpu_s
        memory_mb = row.get("memory_limit_mb") or self._config.memory_mb
        return Limits(
            wall_s=cpu_s * self._config.wall_over_cpu,
            cpu_s=math.ceil(cpu_s),
            memory_bytes=int(memory_mb) << 20,
            output_bytes=self._config.output_kb << 10,
        )


def last_program(text: str, languages: Sequence[Language]) -> tuple[str, Language] | None:
    """The last fenced block in one of these languages, and which; a block that says nothing is in the first."""
    tags = {"": languages[0], **{tag: language for tag, language in TAGS.items() if language in languages}}
    blocks = [(code, tags[tag]) for word, code in _fenced(text) if (tag := word.lower()) in tags]
    return blocks[-1] if blocks and blocks[-1][0].strip() else None


def _fenced(text: str) -> Iterator[tuple[str, str]]:
    """What each fenced block says it is in, and its content. Time is linear in the text, also where a policy repeats
    itself and opens a thousand blocks."""
    opened: re.Match[str] | None = None
    for fence in FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[1] and not fence[2].strip():
            yield opened[1], text[opened.end() + 1 : fence.start()]
            opened = None


def _compiler_limits(config: SandboxConfig) -> Limits:
    return compiler_limits(
        cpu_s=config.compile_cpu_s,
        wall_s=config.compile_cpu_s * config.wall_over_cpu,
        memory_bytes=config.compile_memory_mb << 20,
    )


def _details(outcome: Outcome) -> dict[str, float]:
    return {
        "tests_passed": float(outcome.passed),
        "tests_run": float(outcome.ran),
        "tests": float(outcome.tests),
        "sandbox_retries": float(outcome.retries),
        f"sandbox_{outcome.tier}": 1.0,
    }


def _not_run(reason: str, tier: str) -> Reward:
    return Reward(0.0, reason, {"tests_passed": 0.0, "tests_run": 0.0, f"sandbox_{tier}": 1.0})


def _own_limits_problem(row: Mapping[str, Any]) -> str | None:
    for name, most in (("time_limit_s", 3600.0), ("memory_limit_mb", MOST_PROGRAM_MB), ("tolerance", 1.0)):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            return f"{name} must be a number above 0 and at most {most:g}, not {value!r}"
    if 0 < (row.get("memory_limit_mb") or 0) < LEAST_PROGRAM_MB:
        return f"memory_limit_mb is {row['memory_limit_mb']}, and an interpreter needs {LEAST_PROGRAM_MB}"
    return None
