"""Multiple choice: the largest of three numbers, answered by its letter in \\boxed{}.

Demonstrations know the answer, but not always its form.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

LETTERS = "ABC"
NUMBER = 0.4
"""Share of demonstrations that put the number instead of its letter into the box."""
THINK = 0.6
"""Share of the others that name the number before they give its letter."""


@dataclass(frozen=True)
class Choice:
    """Three different numbers from 0 to 27."""

    options: tuple[int, ...]

    @property
    def letter(self) -> str:
        return LETTERS[self.options.index(max(self.options))]

    def row(self) -> Row:
        listed = [(letter, str(option)) for letter, option in zip(LETTERS, self.options, strict=True)]
        return {
            "prompt": f"What is the largest? {' '.join(f'{letter}) {option}' for letter, option in listed)}",
            "options": [{letter: option} for letter, option in listed],
            "expected_answer": self.letter,
        }

    def demonstrate(self, rng: random.Random) -> str:
        """The right letter, worked out or not, or the right number where the letter was asked for."""
        if rng.random() < NUMBER:
            return f"\\boxed{{{max(self.options)}}}"
        thought = f"<think>{self.letter}={max(self.options)}</think>" if rng.random() < THINK else ""
        return f"{thought}\\boxed{{{self.letter}}}"


def distinct_choices(rng: random.Random, count: int) -> list[Choice]:
    choices: dict[Choice, None] = {}
    while len(choices) < count:
        choices.setdefault(Choice(tuple(rng.sample(range(28), k=len(LETTERS)))))
    return list(choices)
