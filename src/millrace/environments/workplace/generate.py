"""An office of invented people, drawn from a seed: the same seed gives the same tables."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import cache

from millrace.environments.workplace.analytics_tools import SOURCES
from millrace.environments.workplace.customer_tools import PRODUCTS, STATUSES
from millrace.environments.workplace.email_tools import NOW
from millrace.environments.workplace.project_tools import BOARDS, LISTS
from millrace.environments.workplace.tables import (
    CUSTOMER_COLUMNS,
    EMAIL_COLUMNS,
    EVENT_COLUMNS,
    KEY_DIGITS,
    PLOT_COLUMNS,
    TASK_COLUMNS,
    Office,
    Row,
    Table,
)

OFFICE_SEED = 1
"""Of the office in which rows without tables of their own play."""
FIRST_KEY = 2001
"""No key is one of the public tables, so that a row which is meant for those fails here instead of naming another
thing."""
EMAILS, EVENTS, TASKS, CUSTOMERS, VISITS = 160, 120, 120, 100, 300

HOST = "quarry.example"
PEOPLE = (
    "Ada Lindqvist",
    "Bela Kovacs",
    "Chidi Eze",
    "Dora Marin",
    "Emil Hartmann",
    "Farah Nasser",
    "Goran Petek",
    "Hana Mori",
    "Ivo Santos",
    "Jun Takeda",
    "Kaja Nilsen",
    "Lior Adler",
    "Mei Tan",
    "Noor Rahman",
)
CUSTOMER_NAMES = (
    "Abel",
    "Berta",
    "Cyril",
    "Dina",
    "Egon",
    "Flora",
    "Gustav",
    "Hilda",
    "Igor",
    "Judith",
    "Karl",
    "Lotte",
)
CUSTOMER_SURNAMES = ("Ames", "Boyle", "Crane", "Dahl", "Ekberg", "Frost", "Gall", "Hobbs", "Irwin", "Jolly")
FIRMS = ("alderworks", "brightmill", "coppergate", "dunesoft", "elmfield", "fernbank")
MEETINGS = ("Budget review", "Release planning", "Design critique", "Hiring sync", "Roadmap talk", "Vendor call")
OCCASIONS = ("alpha", "beta", "north", "south", "east", "west", "winter", "summer", "pilot", "archive")
VERBS = ("Refactor", "Document", "Test", "Speed up", "Redesign", "Remove", "Translate")
PARTS = ("the login page", "the search index", "the invoice export", "the settings menu", "the image cache", "the tour")
SUBJECTS = ("Question about", "News on", "Notes on", "Delay of", "Figures for")
BODIES = (
    "Could you have a look before Friday?",
    "All is on track, nothing to do for you.",
    "I would like to hear your opinion.",
    "Two points are still open; call me when you can.",
    "Please keep this to yourself for now.",
)
NOTES = ("Asked for a price list.", "Prefers to be called.", "Wants a demonstration.", "Pays late.")
MINUTES = ("15", "30", "45", "60", "90")


def mail_address(name: str) -> str:
    """A colleague's address."""
    return f"{name.lower().replace(' ', '.')}@{HOST}"


@cache
def generated_office(seed: int = OFFICE_SEED) -> Office:
    """The office of a seed; copy it before anything changes it."""
    rng = random.Random(seed)
    return Office(
        emails=_table(EMAIL_COLUMNS, _emails(rng)),
        events=_table(EVENT_COLUMNS, _events(rng)),
        tasks=_table(TASK_COLUMNS, _tasks(rng)),
        customers=_table(CUSTOMER_COLUMNS, _customers(rng)),
        plots=Table(PLOT_COLUMNS, {}),
        visits=list(_visits(rng)),
        addresses=[mail_address(name) for name in PEOPLE],
    )


def _table(columns: Sequence[str], rows: Iterator[Sequence[str | None]]) -> Table:
    keyed = {}
    for number, values in enumerate(rows, FIRST_KEY):
        key = str(number).zfill(KEY_DIGITS)
        keyed[key] = dict(zip(columns, (key, *values), strict=True))
    return Table(columns, keyed)


def _emails(rng: random.Random) -> Iterator[Sequence[str]]:
    now = datetime.fromisoformat(NOW)
    sent = sorted(now - timedelta(seconds=rng.randrange(60, 60 * 86400)) for _ in range(EMAILS))
    for moment in sent:
        name = rng.choice(PEOPLE)
        subject = f"{rng.choice(SUBJECTS)} the {rng.choice(MEETINGS).lower()} {rng.choice(OCCASIONS)}"
        box = "inbox" if rng.random() < 0.8 else "outbox"
        body = f"{rng.choice(BODIES)}\n{name.split()[0] if box == 'inbox' else 'Sam'}"
        yield box, mail_address(name), subject, str(moment), body


def _events(rng: random.Random) -> Iterator[Sequence[str]]:
    days = sorted(rng.randrange(-60, 30) for _ in range(EVENTS))
    for day in days:
        start = datetime(2023, 12, 1, 9) + timedelta(days=day, minutes=30 * rng.randrange(15))
        name = f"{rng.choice(MEETINGS)} {rng.choice(OCCASIONS)}"
        yield name, mail_address(rng.choice(PEOPLE)), str(start), rng.choice(MINUTES)


def _tasks(rng: random.Random) -> Iterator[Sequence[str]]:
    for _ in range(TASKS):
        name = f"{rng.choice(VERBS)} {rng.choice(PARTS)} for {rng.choice(OCCASIONS)}"
        due = (datetime(2023, 12, 1) + timedelta(days=rng.randrange(-21, 28))).date()
        yield name, mail_address(rng.choice(PEOPLE)), rng.choice(LISTS), str(due), rng.choice(BOARDS)


def _customers(rng: random.Random) -> Iterator[Sequence[str | None]]:
    names = [f"{first} {last}" for first in CUSTOMER_NAMES for last in CUSTOMER_SURNAMES]
    for name in rng.sample(names, k=CUSTOMERS):
        contact = datetime(2023, 11, 30) - timedelta(days=rng.randrange(90))
        follow_up = contact + timedelta(days=rng.randrange(7, 60))
        yield (
            mail_address(rng.choice(PEOPLE[:8])),
            name,
            f"{name.lower().replace(' ', '.')}@{rng.choice(FIRMS)}.example",
            f"555-{rng.randrange(10000):04d}" if rng.random() < 0.5 else None,
            str(contact.date()),
            rng.choice(PRODUCTS),
            rng.choice(STATUSES),
            str(follow_up.date()),
            rng.choice(NOTES) if rng.random() < 0.6 else None,
        )


def _visits(rng: random.Random) -> Iterator[Row]:
    for _ in range(VISITS):
        day = datetime(2023, 11, 30) - timedelta(days=rng.randrange(40))
        yield {
            "date_of_visit": str(day.date()),
            "visitor_id": f"{rng.randrange(10000):04d}",
            "page_views": str(rng.randrange(1, 20)),
            "session_duration_seconds": str(rng.randrange(2, 600)),
            "traffic_source": rng.choice(SOURCES),
            "user_engaged": str(rng.random() < 0.4),
        }
