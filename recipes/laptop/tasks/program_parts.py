"""What the programming problems are put together from, each part with the mistakes that are made in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

Inputs = Mapping[str, Any]
"""The values of a problem's variables."""


@dataclass(frozen=True)
class Part:
    """Words of the prompt and their code, in which `{}` stands for the code of the part before."""

    words: str
    right: str
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What problems are about."""

    arguments: str
    given: str
    read: Part
    """Two lines that read the arguments and print what `{}` gives."""
    draw: Callable[[random.Random], Inputs]
    write: Callable[[Inputs], str]
    """The inputs as standard input."""


@dataclass(frozen=True)
class Body:
    """What is to be computed: an expression that its parts build from the first to the last."""

    subject: Subject
    words: str
    parts: tuple[Part, ...]


def all_bodies() -> tuple[list[Body], ...]:
    """By subject."""
    return pair_bodies(), text_bodies(), list_bodies()


PAIR = Subject(
    arguments="a, b",
    given="two numbers a and b",
    read=Part("", "a, b = map(int, input().split())\nprint({})", ("a, b = input().split()\nprint({})",)),
    draw=lambda rng: {"a": rng.randint(-9, 20), "b": rng.randint(-9, 20)},
    write=lambda inputs: f"{inputs['a']} {inputs['b']}",
)


def pair_bodies() -> list[Body]:
    bases = [
        Part("the sum of a and b", "(a + b)", ("a + b",)),
        Part("a minus b", "(a - b)", ("a - b", "(b - a)")),
        Part("the product of a and b", "a * b", ("(a + b)",)),
        Part("the larger of a and b", "max(a, b)", ("min(a, b)",)),
        Part("the smaller of a and b", "min(a, b)", ("max(a, b)",)),
        Part("the distance of a and b", "abs(a - b)", ("(a - b)",)),
        Part("half the sum of a and b, rounded down", "(a + b) // 2", ("(a + b) / 2", "a + b // 2")),
    ]
    times = [Part(f", times {n}", f"{{}} * {n}") for n in range(2, 10)]
    modulo = [Part(f", modulo {n}", f"{{}} % {n}", (f"{{}} // {n}",)) for n in range(3, 10)]
    numbers = range(1, 10)
    shifts = [
        Part("", "{}"),
        *(Part(f", plus {n}", f"{{}} + {n}") for n in numbers),
        *(Part(f", minus {n}", f"{{}} - {n}") for n in numbers),
    ]
    bounds = [
        *(Part(f", but at least {n}", f"max({{}}, {n})", (f"min({{}}, {n})",)) for n in numbers),
        *(Part(f", but at most {n}", f"min({{}}, {n})", (f"max({{}}, {n})",)) for n in numbers),
    ]
    # a remainder is within most bounds anyway
    chains = [*product(bases, times, [*shifts, *bounds]), *product(bases, modulo, shifts)]
    return [Body(PAIR, "".join(part.words for part in parts), parts) for parts in chains]


def _draw_text(rng: random.Random) -> Inputs:
    words = ["".join(rng.choices("abcdeABCDE", k=rng.randint(1, 4))) for _ in range(4)]
    return {"s": " ".join(words)}


TEXT = Subject(
    arguments="s",
    given="a line s",
    read=Part("", "s = input()\nprint({})", ("s = input().split()\nprint({})",)),
    draw=_draw_text,
    write=lambda inputs: str(inputs["s"]),
)


def text_bodies() -> list[Body]:
    numbers = range(2, 6)
    pieces = [
        *(Part(f"the first {n} letters of s", f"s[:{n}]", (f"s[{n}:]", f"s[:{n - 1}]")) for n in numbers),
        *(Part(f"the last {n} letters of s", f"s[-{n}:]", (f"s[:-{n}]", f"s[{n}:]")) for n in numbers),
        *(Part(f"s without its first {n} letters", f"s[{n}:]", (f"s[:{n}]", f"s[-{n}:]")) for n in numbers),
        *(Part(f"s without its last {n} letters", f"s[:-{n}]", (f"s[-{n}:]", f"s[:{n}]")) for n in numbers),
        *(Part(f"every letter of s in steps of {n}", f"s[::{n}]", (f"s[{n}]", f"s[:{n}]")) for n in numbers),
    ]
    backwards = Part(", reversed", "{}[::-1]", ("{}[:-1]", "reversed({})"))
    capitals = Part(", in capitals", "{}.upper()", ("{}.capitalize()", "{}.upper"))
    small = Part(", in small letters", "{}.lower()", ("{}.upper()", "{}.lower"))
    dashes = Part(", with dashes for spaces", '{}.replace(" ", "-")', ('{}.replace("-", " ")',))
    changes = [
        *((one,) for one in (backwards, capitals, small, dashes)),
        *(pair for pair in permutations((backwards, capitals, small, dashes), 2) if set(pair) != {capitals, small}),
    ]
    repeats = [Part("", "{}"), *(Part(f", {n} times", f"{{}} * {n}") for n in range(2, 5))]
    chains = [(piece, *some, repeat) for piece, some, repeat in product(pieces, changes, repeats)]
    return [Body(TEXT, "".join(part.words for part in parts), parts) for parts in chains]


def _draw_list(rng: random.Random) -> Inputs:
    return {"v": [rng.randint(-9, 12) for _ in range(rng.randint(4, 7))]}


LIST = Subject(
    arguments="v",
    given="a line of numbers v",
    read=Part("", "v = map(int, input().split())\nprint({})", ("v = input().split()\nprint({})",)),
    draw=_draw_list,
    write=lambda inputs: " ".join(map(str, inputs["v"])),
)


def list_bodies() -> list[Body]:
    each = [
        Part("", "x"),
        Part(", squared", "x * x", ("x * 2",)),
        Part(", without signs", "abs(x)", ("-x",)),
        *(Part(f", times {n}", f"x * {n}", (f"x ** {n}",)) for n in range(2, 6)),
        *(Part(f", plus {n}", f"x + {n}") for n in range(1, 6)),
    ]
    which = [
        Part("the even numbers of v", "{} for x in v if x % 2 == 0", ("{} for x in v if x % 2",)),
        Part("the odd numbers of v", "{} for x in v if x % 2", ("{} for x in v if x % 2 == 0",)),
        *(_comparison("above", ">", n) for n in range(8)),
        *(_comparison("below", "<", n) for n in range(8)),
        *(
            Part(f"the multiples of {n} in v", f"{{}} for x in v if x % {n} == 0", (f"{{}} for x in v if x % {n}",))
            for n in range(3, 6)
        ),
    ]
    gather = [
        Part("the sum of ", "sum({})", ("len([{}])", "sum([{}]) / 2")),
        Part("the largest of ", "max({})", ("min({})", "sorted({})")),
        Part("the smallest of ", "min({})", ("max({})", "sorted({})")),
    ]
    return [
        Body(LIST, f"{gathered.words}{some.words}{change.words}", (change, some, gathered))
        for change, some, gathered in product(each, which, gather)
    ]


def _comparison(word: str, sign: str, n: int) -> Part:
    """A bound that is taken in where it should be left out, and the other direction."""
    start, other = "{} for x in v if x", "<" if sign == ">" else ">"
    return Part(f"the numbers of v {word} {n}", f"{start} {sign} {n}", (f"{start} {sign}= {n}", f"{start} {other} {n}"))
