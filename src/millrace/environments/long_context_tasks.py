"""Questions that need several of many documents, drawn from a seed, with prompts of a chosen length in tokens.

The documents are about invented depots. What a question needs is spread over documents that are mixed with others of
the same kind, so that neither a single document nor the look of one gives the answer away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.errors import MillraceError

GOODS = ("barley", "copper wire", "lamp oil", "paper", "roof tiles", "salt", "soap", "timber", "wool", "zinc")
FIRST_NAMES = ("Alma", "Boris", "Celia", "Dario", "Edda", "Felix", "Greta", "Hugo", "Ilse", "Jonas", "Klara", "Lukas")
LAST_NAMES = ("Amberg", "Brandt", "Castell", "Dorn", "Esch", "Faber", "Gruber", "Hauser", "Imhof", "Jansen", "Kessler")
STARTS = (
    "Arn",
    "Bel",
    "Cor",
    "Dun",
    "Elm",
    "Fal",
    "Gor",
    "Hol",
    "Ing",
    "Jor",
    "Kel",
    "Lun",
    "Mor",
    "Nor",
    "Ost",
    "Per",
)
MIDDLES = ("", "a", "en", "er", "i", "o", "um", "ys")
ENDS = ("bach", "burg", "dale", "feld", "ford", "haven", "heim", "moor", "stead", "wick")
REMARKS = (
    "Its roof was repaired after a storm.",
    "The road to it is closed in winter.",
    "Most of the staff live in the next village.",
    "A new scale was put up at the gate.",
    "Visitors have to register a day before.",
    "The old crane was sold to a museum.",
    "Night shifts ended some years ago.",
    "An inspection found nothing to complain about.",
    "The yard floods when the snow melts.",
    "Its cellar is rented to a theatre.",
)
ASK = "Answer the question at the end from the documents alone."
GOODS_OF_A_DEPOT, REMARKS_OF_A_DEPOT = 4, 3
SPARE = 1.2
"""So many more documents are drawn than the length is likely to hold; those that do not fit are left out."""

POOL = 6
"""At least so many depots are drawn for each that a question needs, for not every good is stored everywhere."""

Count = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Depot:
    name: str
    manager: str
    opened: int
    stock: dict[str, int]
    supplier: str
    text: str


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    needed: frozenset[str]
    """Names of the depots whose documents it takes."""


def make_rows(count: Count, *, seed: int, rows: int, tokens: int, needed: int) -> Iterator[dict[str, Any]]:
    """Rows for the environment `long_context`.

    Args:
        count: tokens of a text.
        tokens: longest prompt; one is shorter than that by about a document at most.
        needed: documents that a question takes.

    Raises:
        MillraceError: so many documents do not fit, or there are not so many names.
    """
    rng = random.Random(seed)
    for _ in range(rows):
        yield _row(rng, count, tokens, needed)


def _row(rng: random.Random, count: Count, tokens: int, needed: int) -> dict[str, Any]:
    sample = _depots(rng, 8)
    likely = int(SPARE * tokens / (sum(count(_document(depot, 1)) for depot in sample) / len(sample))) + 1
    depots = _depots(rng, max(POOL * needed, likely))
    question = rng.choice(QUESTIONS)(rng, depots, needed)
    kept = [depot for depot in depots if depot.name in question.needed]
    others = [depot for depot in depots if depot.name not in question.needed]
    room = tokens - count(_prompt(kept, question))
    if room < 0:
        raise MillraceError(
            f"{needed} documents and a question take {tokens - room} tokens, more than the {tokens} asked for; raise "
            "the length or ask for fewer documents"
        )
    for depot in others:
        room -= count(_document(depot, len(depots)))
        if room < 0:
            break
        kept.append(depot)
    rng.shuffle(kept)
    # Tokens merge over the seams of documents, and numbers of documents differ in length: the whole is counted again.
    while count(_prompt(kept, question)) > tokens:
        kept.remove(next(depot for depot in kept if depot.name not in question.needed))
    prompt = _prompt(kept, question)
    places = [number for number, depot in enumerate(kept, 1) if depot.name in question.needed]
    row = {"prompt": prompt, "question": question.text, "answer": question.answer}
    return {**row, "tokens": count(prompt), "documents": len(kept), "needed_documents": places}


def _prompt(depots: Sequence[Depot], question: Question) -> str:
    documents = [_document(depot, number) for number, depot in enumerate(depots, 1)]
    return "\n\n".join([ASK, *documents, f"Question: {question.text}"])


def _document(depot: Depot, number: int) -> str:
    return f"Document {number}: the depot of {depot.name}\n{depot.text}"


NAMES = tuple(start + middle + end for start in STARTS for middle in MIDDLES for end in ENDS)
MOST_DEPOTS = len(NAMES)


def _depots(rng: random.Random, number: int) -> list[Depot]:
    """Depots of which each is supplied by the next one in a circle."""
    if number > MOST_DEPOTS:
        raise MillraceError(f"there are names for {MOST_DEPOTS} documents, not for {number}; ask for fewer")
    names = rng.sample(NAMES, k=number)
    return [_depot(rng, name, names[(i + 1) % number]) for i, name in enumerate(names)]


def _depot(rng: random.Random, name: str, supplier: str) -> Depot:
    manager = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    opened, stock = (
        rng.randrange(1850, 2020),
        {good: rng.randrange(12, 980) for good in rng.sample(GOODS, k=len(GOODS))},
    )
    shown = dict(list(stock.items())[:GOODS_OF_A_DEPOT])
    sentences = [
        f"The depot opened in {opened}.",
        f"It is managed by {manager}.",
        f"What it lacks is supplied by the depot of {supplier}.",
        *(f"It stores {amount} crates of {good}." for good, amount in shown.items()),
        *rng.sample(REMARKS, k=REMARKS_OF_A_DEPOT),
    ]
    rng.shuffle(sentences)
    return Depot(name, manager, opened, shown, supplier, " ".join(sentences))


# ---- questions


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _storing(rng: random.Random, depots: Sequence[Depot], needed: int) -> tuple[str, list[Depot]]:
    """A good, and so many depots that store it."""
    for good in rng.sample(GOODS, k=len(GOODS)):
        having = [depot for depot in depots if good in depot.stock]
        if len(having) >= needed:
            return good, rng.sample(having, k=needed)
    raise MillraceError(f"no good is stored by {needed} of {len(depots)} depots; raise the length")


def _total(rng: random.Random, depots: Sequence[Depot], needed: int) -> Question:
    good, chosen = _storing(rng, depots, needed)
    names = [depot.name for depot in chosen]
    text = f"How many crates of {good} do the depots of {_listed(names)} store together?"
    return Question(text, str(sum(depot.stock[good] for depot in chosen)), frozenset(names))


def _most(rng: random.Random, depots: Sequence[Depot], needed: int) -> Question:
    good, chosen = _storing(rng, depots, needed)
    best = max(chosen, key=lambda depot: depot.stock[good])
    ties = sum(depot.stock[good] == best.stock[good] for depot in chosen)
    if ties > 1:
        return _total(rng, depots, needed)
    names = [depot.name for depot in chosen]
    text = f"Who manages the one of the depots of {_listed(names)} that stores most crates of {good}?"
    return Question(text, best.manager, frozenset(names))


def _oldest_first(rng: random.Random, depots: Sequence[Depot], needed: int) -> Question:
    by_year = {depot.opened: depot for depot in depots}
    if len(by_year) < needed:
        return _total(rng, depots, needed)
    chosen = rng.sample(list(by_year.values()), k=needed)
    names = [depot.name for depot in chosen]
    ordered = [depot.name for depot in sorted(chosen, key=lambda depot: depot.opened)]
    text = f"In which order did the depots of {_listed(names)} open? List them, the oldest first."
    return Question(text, ", ".join(ordered), frozenset(names))


def _chain(rng: random.Random, depots: Sequence[Depot], needed: int) -> Question:
    by_name = {depot.name: depot for depot in depots}
    way = [rng.choice(depots)]
    while len(way) < needed:
        way.append(by_name[way[-1].supplier])
    steps = needed - 1
    text = (
        f"Go from the depot of {way[0].name} to the one that supplies it, from there to the one that supplies that, "
        f"and so on, {steps} {'step' if steps == 1 else 'steps'} in all. Who manages the depot at which you end?"
    )
    return Question(text, way[-1].manager, frozenset(depot.name for depot in way))


QUESTIONS: tuple[Callable[[random.Random, Sequence[Depot], int], Question], ...] = (
    _total,
    _most,
    _oldest_first,
    _chain,
)
