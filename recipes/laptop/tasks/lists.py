"""Instruction following: short lists of words under two or three constraints that a program can check.

A demonstration follows each constraint with chance OBEY only, so that a supervised policy knows the task without having
mastered it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]

OBEY = 0.8
"""Chance that a demonstration follows one of its constraints on purpose."""

TOPICS = {
    "animals": ("cat", "dog", "horse", "mouse", "sheep", "tiger"),
    "fruits": ("apple", "pear", "plum", "cherry", "melon", "grape"),
    "colours": ("red", "blue", "green", "black", "white", "brown"),
    "tools": ("hammer", "saw", "drill", "ladder", "brush", "spade"),
}
CLOSINGS = ("done", "goodbye", "thanks")


@dataclass(frozen=True)
class Style:
    """How a list of words is written."""

    items: int
    case: str = "sentence"
    separator: str = ", "
    bullets: bool = False
    quoted: bool = False
    include: str | None = None
    closing: str | None = None

    def write(self, topic: str, rng: random.Random) -> str:
        words = rng.sample([word for word in TOPICS[topic] if word != self.include], k=self.items)
        if self.include is not None:
            words[rng.randrange(len(words))] = self.include
        if self.closing is not None:
            words[-1:] = [self.closing] if len(words) > 1 and self.include != words[-1] else [words[-1], self.closing]
        if self.bullets:
            text = "\n".join(f"- {word.capitalize()}" for word in words)
        else:
            text = self.separator.join(words).capitalize()
        text = {"sentence": text, "lower": text.lower(), "upper": text.upper()}[self.case]
        return f'"{text}"' if self.quoted else text


@dataclass(frozen=True)
class Wish:
    """One constraint: its sentence in the prompt, its checkable form, and how a demonstration follows or misses it."""

    group: str
    """Two wishes of one group never meet in a prompt."""
    sentence: str
    instruction_id: str
    kwargs: Row
    follow: Callable[[Style], Style]
    miss: Callable[[Style], Style]


def _case_wish(rng: random.Random, topic: str) -> Wish:
    case = rng.choice(("lower", "upper"))
    name, instruction = {
        "lower": ("lowercase", "change_case:english_lowercase"),
        "upper": ("capital", "change_case:english_capital"),
    }[case]
    return Wish("case", f"Use {name} letters.", instruction, {}, lambda s: replace(s, case=case), lambda s: s)


def _comma_wish(rng: random.Random, topic: str) -> Wish:
    return Wish(
        "comma", "Use no commas.", "punctuation:no_comma", {}, lambda s: replace(s, separator=" and "), lambda s: s
    )


def _length_wish(rng: random.Random, topic: str) -> Wish:
    relation = rng.choice(("at least", "less than"))
    number = rng.choice((4, 5))
    enough, wrong = (number, number - 2) if relation == "at least" else (2, number)
    return Wish(
        "layout",
        f"Write {relation} {number} words.",
        "length_constraints:number_words",
        {"relation": relation, "num_words": number},
        lambda s: replace(s, items=enough),
        lambda s: replace(s, items=wrong),
    )


def _bullet_wish(rng: random.Random, topic: str) -> Wish:
    number = rng.choice((2, 3, 4))
    return Wish(
        "layout",
        f"Write {number} bullets.",
        "detectable_format:number_bullet_lists",
        {"num_bullets": number},
        lambda s: replace(s, items=number, bullets=True),
        lambda s: replace(s, items=number),
    )


def _keyword_wish(rng: random.Random, topic: str) -> Wish:
    word = rng.choice(TOPICS[topic])
    return Wish(
        "keyword",
        f"Include {word}.",
        "keywords:existence",
        {"keywords": [word]},
        lambda s: replace(s, include=word),
        lambda s: s,
    )


def _closing_wish(rng: random.Random, topic: str) -> Wish:
    word = rng.choice(CLOSINGS)
    return Wish(
        "closing",
        f"End with {word}.",
        "startend:end_checker",
        {"end_phrase": word},
        lambda s: replace(s, closing=word),
        lambda s: s,
    )


def _quotation_wish(rng: random.Random, topic: str) -> Wish:
    return Wish("layout", "Use quotes.", "startend:quotation", {}, lambda s: replace(s, quoted=True), lambda s: s)


WISHES = (_case_wish, _comma_wish, _length_wish, _bullet_wish, _keyword_wish, _closing_wish, _quotation_wish)


@dataclass(frozen=True)
class ListTask:
    topic: str
    wishes: tuple[Wish, ...]

    def row(self) -> Row:
        return {
            "prompt": " ".join([f"Name some {self.topic}.", *(wish.sentence for wish in self.wishes)]),
            "instruction_id_list": [wish.instruction_id for wish in self.wishes],
            "kwargs": [wish.kwargs for wish in self.wishes],
        }

    def demonstrate(self, rng: random.Random) -> str:
        """An answer that follows each constraint with chance OBEY."""
        style = Style(items=rng.choice((2, 3, 4)))
        for wish in self.wishes:
            style = wish.follow(style) if rng.random() < OBEY else wish.miss(style)
        return style.write(self.topic, rng)


def draw_list_task(rng: random.Random) -> ListTask:
    topic = rng.choice(tuple(TOPICS))
    wishes: dict[str, Wish] = {}
    wanted = rng.choice((2, 2, 2, 3))
    while len(wishes) < wanted:
        wish = rng.choice(WISHES)(rng, topic)
        wishes.setdefault(wish.group, wish)
    return ListTask(topic, tuple(wishes.values()))


def distinct_list_tasks(rng: random.Random, count: int) -> list[ListTask]:
    """Tasks with pairwise different sets of constraints, whatever their order."""
    tasks: dict[frozenset[str], ListTask] = {}
    while len(tasks) < count:
        task = draw_list_task(rng)
        tasks.setdefault(frozenset([task.topic, *(wish.sentence for wish in task.wishes)]), task)
    return list(tasks.values())
