"""Chat: short invitations, which a judge likes the better the more a good one has.

A good invitation greets, says when, says please and ends with a farewell: four points on top of one, so that its
quality is a number from 1 to 5 that a rule can count and a small judge can learn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

NAMES = ("Ann", "Bob", "Eva", "Ida", "Jan", "Kim", "Leo", "Max", "Ned", "Pia", "Tom", "Zoe")
PLACES = ("barn", "field", "garden", "hall", "house", "kitchen", "park", "river", "school", "shop", "street", "yard")
COMPANY = ("", " with a friend", " with a dog", " with a cake", " with a drum", " with a song")
GREETINGS, FAREWELLS = ("Hello", "Dear"), ("Goodbye", "Yours")
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
PLEASE = "Please come"
PARTS = ("greeting", "day", "please", "farewell")
CARE = 0.5
"""Chance that a demonstration has one of the four parts."""


@dataclass(frozen=True)
class NoteTask:
    name: str
    place: str
    company: str

    def row(self) -> Row:
        return {"prompt": f"Invite {self.name} to the {self.place}{self.company}."}

    def draw(self, rng: random.Random, care: float) -> str:
        """An invitation that has each of the four parts with chance `care`."""
        greets, dated, pleads, closes = (rng.random() < care for _ in PARTS)
        day = f" on {rng.choice(DAYS)}" if dated else ""
        sentences = [f"{PLEASE if pleads else 'Come'} to the {self.place}{day}."]
        if greets:
            sentences.insert(0, f"{rng.choice(GREETINGS)} {self.name}.")
        if closes:
            sentences.append(f"{rng.choice(FAREWELLS)}.")
        return " ".join(sentences)

    def demonstrate(self, rng: random.Random) -> str:
        return self.draw(rng, CARE)


def parts_of(answer: str) -> tuple[bool, ...]:
    """Which of PARTS an invitation has."""
    words = answer.replace(".", " ").split() or [""]
    return words[0] in GREETINGS, not set(words).isdisjoint(DAYS), PLEASE in answer, words[-1] in FAREWELLS


def quality(answer: str) -> int:
    """1 for an invitation with nothing to it, 5 for one that has all four parts."""
    return 1 + sum(parts_of(answer))


def all_note_tasks() -> list[NoteTask]:
    return [NoteTask(name, place, company) for name in NAMES for place in PLACES for company in COMPANY]
