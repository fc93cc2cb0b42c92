"""Tasks for the office of `generate`, each with the calls that solve it, drawn from a seed.

A template draws what a task is about and asks the tables themselves which rows it means, so that the wording is never
ambiguous: a draw that fits no row, or too many, is thrown away.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Literal

from millrace.environments.workplace.analytics_tools import PLOT_TYPES, VALUES
from millrace.environments.workplace.customer_tools import PRODUCTS, STATUSES
from millrace.environments.workplace.email_tools import NOW
from millrace.environments.workplace.generate import (
    BODIES,
    MEETINGS,
    MINUTES,
    OCCASIONS,
    PARTS,
    PEOPLE,
    VERBS,
    mail_address,
)
from millrace.environments.workplace.office import schemas
from millrace.environments.workplace.project_tools import BOARDS, LISTS
from millrace.environments.workplace.tables import Office, Row
from millrace.errors import MillraceError

SYSTEM = (
    "You are Sam's assistant at the office. It is Thursday, 2023-11-30, 23:59. Use the tools to do what Sam asks, and "
    "say so when it is done."
)

MOST_DRAWS = 100
"""Draws for each task that is wanted before the search for new ones ends."""

Call = tuple[str, dict[str, str]]

LOOKUPS = {
    "email": ("company_directory_find_email_address", "email_search_emails"),
    "calendar": ("company_directory_find_email_address", "calendar_search_events"),
    "analytics": (),
    "project_management": ("company_directory_find_email_address", "project_management_search_tasks"),
    "customer_relationship_manager": (
        "company_directory_find_email_address",
        "customer_relationship_manager_search_customers",
    ),
}
"""What has to be read before something can be changed, by database."""


@dataclass(frozen=True)
class Task:
    """What Sam asks for, and the calls that do it."""

    category: str
    request: str
    calls: tuple[Call, ...]

    def row(self, offer: Literal["all", "needed"]) -> dict[str, Any]:
        """The task as a data row. needed: only the tools that it takes are offered; all: those of a row without any."""
        calls = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in self.calls]
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.request}]
        row: dict[str, Any] = {"prompt": prompt, "ground_truth": calls, "category": self.category}
        return row if offer == "all" else {**row, "tools": schemas(self.tools())}

    def tools(self) -> list[str]:
        """The tools that the task takes."""
        written = [name for name, _ in self.calls]
        read = [
            lookup
            for name in written
            for base, lookups in LOOKUPS.items()
            if name.startswith(base)
            for lookup in lookups
        ]
        return list(dict.fromkeys([*read, *written]))


Template = Callable[[Office, random.Random], tuple[str, list[Call]] | None]


def distinct_tasks(office: Office, seed: int, count: int, *, most_calls: int) -> list[Task]:
    """`count` tasks with pairwise different requests, of at most `most_calls` calls each, over all templates.

    Raises:
        MillraceError: there are hardly so many.
    """
    rng = random.Random(seed)
    tasks: dict[str, Task] = {}
    for _, task in zip(range(MOST_DRAWS * max(count, 1)), _drawn(office, rng), strict=False):
        if len(tasks) == count:
            break
        if len(task.calls) <= most_calls:
            tasks.setdefault(task.request, task)
    if len(tasks) < count:
        raise MillraceError(f"{count} different tasks were asked for, but only {len(tasks)} were found; ask for fewer")
    return list(tasks.values())


def _drawn(office: Office, rng: random.Random) -> Iterator[Task]:
    while True:
        category = rng.choice(tuple(TEMPLATES))
        drawn = rng.choice(TEMPLATES[category])(office, rng)
        if drawn is not None and drawn[1]:
            yield Task(f"workplace_assistant_{category}", drawn[0], tuple(drawn[1]))


# ---- what templates draw


def _first(name: str) -> str:
    return name.split()[0]


def _two(rng: random.Random) -> tuple[str, str]:
    one, other = rng.sample(PEOPLE, k=2)
    return one, other


def _day(rng: random.Random) -> str:
    """A coming day."""
    return str(date(2023, 12, 1) + timedelta(days=rng.randrange(60)))


def _owner(row: Row, column: str) -> str:
    """The colleague whose address a row has."""
    return next(name for name in PEOPLE if mail_address(name) == row[column])


def _event_day(row: Row) -> str:
    return str(row["event_start"])[:10]


def _pick(rng: random.Random, rows: list[Row], *columns: str) -> Row | None:
    """A row that no other has the same values of in these columns."""
    row = rng.choice(rows)
    same = [other for other in rows if all(other[column] == row[column] for column in columns)]
    return row if len(same) == 1 else None


def _key(row: Row) -> str:
    return str(next(iter(row.values())))


# ---- templates


def _send(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    name, subject, body = rng.choice(PEOPLE), f"{rng.choice(MEETINGS)} {rng.choice(OCCASIONS)}", rng.choice(BODIES)
    call = ("email_send_email", {"recipient": mail_address(name), "subject": subject, "body": body})
    return f"Send {_first(name)} an email with the subject '{subject}' and the text '{body}'", [call]


def _latest_from(office: Office, name: str) -> Row | None:
    got = [
        row for row in office.emails if row["sender/recipient"] == mail_address(name) and row["inbox/outbox"] == "inbox"
    ]
    return max(got, key=lambda row: str(row["sent_datetime"]), default=None)


def _reply(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    name, body = rng.choice(PEOPLE), rng.choice(BODIES)
    row = _latest_from(office, name)
    if row is None:
        return None
    request = f"Answer the last email that I got from {_first(name)} with '{body}'"
    return request, [("email_reply_email", {"email_id": _key(row), "body": body})]


def _delete_last(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    name = rng.choice(PEOPLE)
    row = _latest_from(office, name)
    request = f"Delete the last email that I got from {_first(name)}"
    return None if row is None else (request, [("email_delete_email", {"email_id": _key(row)})])


def _forward(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    row, name = _pick(rng, list(office.emails), "subject"), rng.choice(PEOPLE)
    if row is None:
        return None
    request = f"Forward the email '{row['subject']}' to {_first(name)}"
    return request, [("email_forward_email", {"email_id": _key(row), "recipient": mail_address(name)})]


def _meet(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    name, minutes, day = rng.choice(PEOPLE), rng.choice(MINUTES), _day(rng)
    title, hour = f"{rng.choice(MEETINGS)} {rng.choice(OCCASIONS)}", rng.randrange(9, 17)
    arguments = {"event_name": title, "participant_email": mail_address(name)}
    arguments |= {"event_start": f"{day} {hour:02d}:00:00", "duration": minutes}
    request = f"Put '{title}' with {_first(name)} into my calendar, on {day} at {hour}:00 for {minutes} minutes"
    return request, [("calendar_create_event", arguments)]


def _cancel(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    row = _pick(rng, list(office.events), "event_name")
    request = f"Cancel '{row['event_name']}'" if row else ""
    return None if row is None else (request, [("calendar_delete_event", {"event_id": _key(row)})])


def _change_event(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    row = _pick(rng, list(office.events), "event_name")
    if row is None:
        return None
    field, value, wish = rng.choice(
        [
            ("duration", (minutes := rng.choice(MINUTES)), f"Make it {minutes} minutes long"),
            ("event_name", (title := f"{rng.choice(MEETINGS)} {rng.choice(OCCASIONS)}"), f"Call it '{title}' instead"),
            ("event_start", f"{(day := _day(rng))} 11:00:00", f"Move it to {day} at 11:00"),
        ]
    )
    if row[field] == value:
        return None
    arguments = {"event_id": _key(row), "field": field, "new_value": value}
    return f"There is '{row['event_name']}' in my calendar. {wish}", [("calendar_update_event", arguments)]


def _cancel_all(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    name = rng.choice(PEOPLE)
    coming = [
        row for row in office.events if row["participant_email"] == mail_address(name) and str(row["event_start"]) > NOW
    ]
    calls: list[Call] = [("calendar_delete_event", {"event_id": _key(row)}) for row in coming]
    return f"{_first(name)} is leaving. Cancel all coming events with them", calls


def _plot(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    start = date(2023, 10, 22) + timedelta(days=rng.randrange(25))
    end, value, kind = start + timedelta(days=rng.randrange(3, 14)), rng.choice(VALUES), rng.choice(PLOT_TYPES)
    arguments = {"time_min": str(start), "time_max": str(end), "value_to_plot": value, "plot_type": kind}
    return f"Make a {kind} plot of {value} from {start} to {end}", [("analytics_create_plot", arguments)]


def _two_plots(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    request, (first,) = _plot(office, rng)
    value = rng.choice([each for each in VALUES if each != first[1]["value_to_plot"]])
    return f"{request}, and then the same for {value}", [first, (first[0], {**first[1], "value_to_plot": value})]


def _new_task(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    title = f"{rng.choice(VERBS)} {rng.choice(PARTS)} for {rng.choice(OCCASIONS)}"
    name, day, board = rng.choice(PEOPLE), _day(rng), rng.choice(BOARDS)
    arguments = {"task_name": title, "assigned_to_email": mail_address(name), "list_name": "Backlog"}
    arguments |= {"due_date": day, "board": board}
    request = f"Put the task '{title}' into the backlog of the {board} board for {_first(name)}, due on {day}"
    return request, [("project_management_create_task", arguments)]


def _move_task(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    row, target = _pick(rng, list(office.tasks), "task_name"), rng.choice(LISTS)
    if row is None or row["list_name"] == target:
        return None
    arguments = {"task_id": _key(row), "field": "list_name", "new_value": target}
    return f"Move the task '{row['task_name']}' to {target}", [("project_management_update_task", arguments)]


def _hand_over(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    (giver, taker), board = _two(rng), rng.choice(BOARDS)
    rows = [
        row
        for row in office.tasks
        if row["assigned_to_email"] == mail_address(giver) and row["board"] == board and row["list_name"] != "Completed"
    ]
    calls: list[Call] = [
        (
            "project_management_update_task",
            {"task_id": _key(row), "field": "assigned_to_email", "new_value": mail_address(taker)},
        )
        for row in rows
    ]
    request = f"Give all of {_first(giver)}'s tasks on the {board} board that are not completed to {_first(taker)}"
    return request, calls


def _set_status(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    row, status = rng.choice(list(office.customers)), rng.choice(STATUSES)
    if row["status"] == status:
        return None
    arguments = {"customer_id": _key(row), "field": "status", "new_value": status}
    call = ("customer_relationship_manager_update_customer", arguments)
    return f"Set the status of the customer {row['customer_name']} to {status}", [call]


def _pass_on(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    giver, taker = rng.sample(PEOPLE[:8], k=2)
    product = rng.choice(PRODUCTS)
    rows = [
        row
        for row in office.customers
        if row["assigned_to_email"] == mail_address(giver) and row["product_interest"] == product
    ]
    calls: list[Call] = [
        (
            "customer_relationship_manager_update_customer",
            {"customer_id": _key(row), "field": "assigned_to_email", "new_value": mail_address(taker)},
        )
        for row in rows
    ]
    return f"{_first(taker)} takes over {_first(giver)}'s customers who are interested in {product}", calls


def _drop_lost(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    name = rng.choice(PEOPLE[:8])
    lost = [
        row for row in office.customers if row["assigned_to_email"] == mail_address(name) and row["status"] == "Lost"
    ]
    calls: list[Call] = [("customer_relationship_manager_delete_customer", {"customer_id": _key(row)}) for row in lost]
    return f"Delete {_first(name)}'s customers whose status is Lost", calls


def _new_customer(office: Office, rng: random.Random) -> tuple[str, list[Call]]:
    name, product = rng.choice(PEOPLE[:8]), rng.choice(PRODUCTS)
    customer = f"{rng.choice(('Maja', 'Nils', 'Olga', 'Pavel'))} {rng.choice(('Quist', 'Rowe', 'Stark', 'Thorn'))}"
    arguments = {"customer_name": customer, "assigned_to_email": mail_address(name)}
    arguments |= {"status": "Lead", "product_interest": product}
    request = f"Add {customer} as a new Lead of {_first(name)}, interested in {product}"
    return request, [("customer_relationship_manager_add_customer", arguments)]


def _move_and_tell(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    drawn, body = _move_task(office, rng), rng.choice(BODIES)
    if drawn is None:
        return None
    row = office.tasks.get(drawn[1][0][1]["task_id"])
    assert row is not None
    name = _owner(row, "assigned_to_email")
    arguments = {"recipient": mail_address(name), "subject": "Your task", "body": body}
    request = f"{drawn[0]}, and send {_first(name)} an email with the subject 'Your task' and the text '{body}'"
    return request, [*drawn[1], ("email_send_email", arguments)]


def _cancel_and_tell(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    drawn = _cancel(office, rng)
    if drawn is None:
        return None
    row = office.events.get(drawn[1][0][1]["event_id"])
    assert row is not None
    arguments = {"recipient": str(row["participant_email"]), "subject": "Cancelled", "body": str(row["event_name"])}
    request = (
        f"{drawn[0]}, and send the participant an email with the subject 'Cancelled' and the event's name as its text"
    )
    return request, [*drawn[1], ("email_send_email", arguments)]


def _follow_up(office: Office, rng: random.Random) -> tuple[str, list[Call]] | None:
    row, day = rng.choice(list(office.customers)), _day(rng)
    if row["follow_up_by"] == day:
        return None
    name, title = _owner(row, "assigned_to_email"), f"Follow-up {row['customer_name']}"
    change = {"customer_id": _key(row), "field": "follow_up_by", "new_value": day}
    event = {"event_name": title, "participant_email": mail_address(name)}
    event |= {"event_start": f"{day} 10:00:00", "duration": "30"}
    request = (
        f"The follow-up of the customer {row['customer_name']} is to be on {day}. Set it, and put '{title}' with "
        f"whoever looks after the customer into my calendar, on that day at 10:00 for 30 minutes"
    )
    calls = [("customer_relationship_manager_update_customer", change), ("calendar_create_event", event)]
    return request, calls


TEMPLATES: Mapping[str, tuple[Template, ...]] = {
    "email": (_send, _reply, _delete_last, _forward),
    "calendar": (_meet, _cancel, _change_event, _cancel_all),
    "analytics": (_plot, _two_plots),
    "project_management": (_new_task, _move_task, _hand_over),
    "customer_relationship_manager": (_set_status, _pass_on, _drop_lost, _new_customer),
    "multiple": (_move_and_tell, _cancel_and_tell, _follow_up),
}
