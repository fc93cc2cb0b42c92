"""Code: short Python programs over two numbers, a line of text or a list of numbers, judged by hidden tests.

A problem is put together from parts (`program_parts`), and each part knows the mistakes that are made in it: a bound
that is taken in, a product that binds before the sum, numbers that are never read as numbers, a result that is printed
where it should be returned. A demonstration makes a mistake in each part with chance SLIP, so that a supervised policy
knows the task without having mastered it. The tests of a problem are chosen so that every single mistake fails.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

from tasks.program_parts import Body, Inputs, Part, all_bodies

Row = dict[str, Any]

SLIP = 0.15
"""Chance that a demonstration makes a mistake in one of the parts where there are any to make."""
TESTS = 4
"""Of a problem, unless its mistakes take more to be told from the right program."""
CANDIDATES = 40
"""Inputs that tests are chosen from."""
FUNCTIONS = ("f", "g", "h")
FENCED = Part("", "```python\n{}\n```", ("{}",))
"""A program outside a fenced block is not found."""


@dataclass(frozen=True)
class CodeTask:
    """A program that reads and prints, or a function with a name."""

    body: Body
    inputs: tuple[Inputs, ...]
    function: str | None

    @property
    def parts(self) -> tuple[Part, ...]:
        """From the innermost code to the answer's outside."""
        frame = self.body.subject.read
        if self.function is not None:
            head = f"def {self.function}({self.body.subject.arguments}):\n    "
            frame = Part("", head + "return {}", (head + "print({})",))
        return (*self.body.parts, frame, FENCED)

    def row(self) -> Row:
        subject, right = self.body.subject, put_together(part.right for part in self.body.parts)
        tests = list(zip(self.inputs, results(right, self.inputs), strict=True))
        if self.function is None:
            prompt = f"Read {subject.given}. Print {self.body.words}."
            streams = [{"input": f"{subject.write(given)}\n", "output": f"{value}\n"} for given, value in tests]
            return {"prompt": prompt, "tests": streams}
        prompt = f"Write {self.function}({subject.arguments}) that returns {self.body.words}."
        calls = [{"input": list(given.values()), "output": value} for given, value in tests]
        return {"prompt": prompt, "function": self.function, "tests": calls}

    def work_out(self) -> str:
        """The right answer."""
        return put_together(part.right for part in self.parts)

    def demonstrate(self, rng: random.Random) -> str:
        """The right answer, or one with mistakes."""
        return put_together(
            rng.choice(part.wrong) if part.wrong and rng.random() < SLIP else part.right for part in self.parts
        )


def put_together(codes: Iterable[str]) -> str:
    whole = ""
    for code in codes:
        whole = code.replace("{}", whole)
    return whole


def with_one_mistake(parts: Sequence[Part]) -> list[tuple[int, str, str]]:
    """Each way of going wrong in one part: the part's place, its wrong code, and the whole with it."""
    rights = [part.right for part in parts]
    return [
        (i, wrong, put_together([*rights[:i], wrong, *rights[i + 1 :]]))
        for i, part in enumerate(parts)
        for wrong in part.wrong
    ]


def results(expression: str, inputs: Iterable[Inputs]) -> list[Any]:
    """What it gives on each input; where it fails, the error."""
    code = compile(expression, "problem", "eval")
    return [_result(code, one) for one in inputs]


def _result(code: CodeType, inputs: Inputs) -> Any:
    try:
        return eval(code, dict(inputs))
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        return error


def make_task(body: Body, function: str | None, rng: random.Random) -> CodeTask:
    """A problem with tests that every mistake fails.

    A mistake that gives the right result on all candidates is none, and is taken out: the largest number above 3 is the
    largest from 3 on.
    """
    drawn = [body.subject.draw(rng) for _ in range(CANDIDATES)]
    right = put_together(part.right for part in body.parts)
    inputs = [one for one, value in zip(drawn, results(right, drawn), strict=True) if not isinstance(value, Exception)]
    values = results(right, inputs)
    parts, catching = list(body.parts), []
    for i, wrong, whole in with_one_mistake(body.parts):
        pairs = zip(values, results(whole, inputs), strict=True)
        if caught := {j for j, (value, given) in enumerate(pairs) if not _same(value, given)}:
            catching.append(caught)
        else:
            parts[i] = replace(parts[i], wrong=tuple(code for code in parts[i].wrong if code != wrong))
    chosen = choose_tests(catching, len(inputs))
    return CodeTask(replace(body, parts=tuple(parts)), tuple(inputs[j] for j in chosen), function)


def _same(value: Any, given: Any) -> bool:
    return type(value) is type(given) and bool(value == given)


def choose_tests(catching: Sequence[set[int]], candidates: int) -> list[int]:
    """Candidates such that each mistake fails one of them, those that catch most first; filled up to TESTS."""
    chosen: list[int] = []
    while open_mistakes := [caught for caught in catching if caught.isdisjoint(chosen)]:
        chosen.append(max(range(candidates), key=lambda j: sum(j in caught for caught in open_mistakes)))
    spare = [j for j in range(candidates) if j not in chosen]
    return [*chosen, *spare[: max(0, TESTS - len(chosen))]]


def distinct_code_tasks(rng: random.Random, count: int) -> list[CodeTask]:
    """Problems with pairwise different bodies, of each subject as many; half of them ask for a function."""
    bodies = [body for some in all_bodies() for body in rng.sample(some, k=-(-count // 3))]
    rng.shuffle(bodies)
    return [make_task(body, rng.choice(FUNCTIONS) if rng.random() < 0.5 else None, rng) for body in bodies[:count]]
