"""Math: sums of three digits, one step at a time between <think> and </think>, then the result in \\boxed{}."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

SLIP, UNBOXED, EARLY = 0.06, 0.2, 0.2
"""Shares of noisy demonstrations with a wrong step, without a box, and with the first step's result in the box."""


@dataclass(frozen=True)
class Sum:
    """a (+|-) b (+|-) c with digits a, b, c from 1 to 8; no step goes below zero."""

    terms: tuple[int, int, int]
    signs: tuple[int, int]

    @property
    def text(self) -> str:
        (a, b, c), (first, second) = self.terms, self.operators
        return f"{a}{first}{b}{second}{c}"

    @property
    def operators(self) -> tuple[str, str]:
        first, second = ("+" if sign > 0 else "-" for sign in self.signs)
        return first, second

    @property
    def partial(self) -> int:
        return self.terms[0] + self.signs[0] * self.terms[1]

    @property
    def result(self) -> int:
        return self.partial + self.signs[1] * self.terms[2]

    def row(self) -> Row:
        return {"prompt": f"What is {self.text}?", "answer": str(self.result)}

    def steps(self, partial: int, result: int) -> str:
        (a, b, c), (first, second) = self.terms, self.operators
        return f"<think>{a}{first}{b}={partial},{partial}{second}{c}={result}</think>"

    def work_out(self) -> str:
        """The right answer, worked out."""
        return f"{self.steps(self.partial, self.result)}\\boxed{{{self.result}}}"

    def with_python(self, tool: str) -> list[Row]:
        """A conversation in which Python works it out."""
        function = {"name": tool, "arguments": {"code": self.text}}
        return [
            {"role": "user", "content": self.row()["prompt"]},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": str(self.result)},
            {"role": "assistant", "content": f"\\boxed{{{self.result}}}"},
        ]

    def demonstrate(self, rng: random.Random) -> str:
        """A worked answer, right or with one of the three flaws."""
        flaw = rng.random()
        slipped_step = rng.randrange(2) if flaw < SLIP else None
        partial = self.partial + (_slip(rng) if slipped_step == 0 else 0)
        result = partial + self.signs[1] * self.terms[2] + (_slip(rng) if slipped_step == 1 else 0)
        steps = self.steps(partial, result)
        if SLIP <= flaw < SLIP + UNBOXED:
            return f"{steps}The answer is {result}."
        if SLIP + UNBOXED <= flaw < SLIP + UNBOXED + EARLY:
            result = partial
        return f"{steps}\\boxed{{{result}}}"


def _slip(rng: random.Random) -> int:
    return rng.choice((-2, -1, 1, 2))


def all_sums() -> list[Sum]:
    digits, signs = range(1, 9), (1, -1)
    sums = (Sum((a, b, c), (s, t)) for a in digits for b in digits for c in digits for s in signs for t in signs)
    return [one for one in sums if one.partial >= 0 and one.result >= 0]
