"""The tables of an office, and how two states of them differ.

Rows are never changed in place: a session's copy of an office shares all rows that it leaves as they are, so that
thousands of sessions cost little.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import MillraceError

Row = Mapping[str, str | None]

KEY_DIGITS = 8

CASE_MATTERS = frozenset({"status", "list_name", "board"})
"""Columns that are compared letter by letter; capitals make no difference in all others."""


class TablesError(MillraceError):
    """A folder of tables that cannot be read."""


class Table:
    """Rows by their key, in the order in which they were added. The first column holds the key."""

    def __init__(self, columns: Sequence[str], rows: Mapping[str, Row]) -> None:
        self.columns = tuple(columns)
        self._rows = dict(rows)

    @property
    def key(self) -> str:
        return self.columns[0]

    def copy(self) -> Table:
        return Table(self.columns, self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> Row | None:
        return self._rows.get(key)

    def add(self, values: Mapping[str, str | None]) -> str:
        """Add a row behind all others; returns its key, the number after the highest one."""
        number = max((int(key) for key in self._rows), default=0) + 1
        key = str(number).zfill(KEY_DIGITS)
        self._rows[key] = {column: values.get(column) for column in self.columns} | {self.key: key}
        return key

    def change(self, key: str, column: str, value: str) -> None:
        self._rows[key] = {**self._rows[key], column: value}

    def remove(self, key: str) -> None:
        del self._rows[key]


EMAIL_COLUMNS = ("email_id", "inbox/outbox", "sender/recipient", "subject", "sent_datetime", "body")
EVENT_COLUMNS = ("event_id", "event_name", "participant_email", "event_start", "duration")
TASK_COLUMNS = ("task_id", "task_name", "assigned_to_email", "list_name", "due_date", "board")
CUSTOMER_COLUMNS = (
    "customer_id",
    "assigned_to_email",
    "customer_name",
    "customer_email",
    "customer_phone",
    "last_contact_date",
    "product_interest",
    "status",
    "follow_up_by",
    "notes",
)
VISIT_COLUMNS = (
    "date_of_visit",
    "visitor_id",
    "page_views",
    "session_duration_seconds",
    "traffic_source",
    "user_engaged",
)
PLOT_COLUMNS = ("plot", "file_path")


@dataclass(frozen=True)
class Office:
    """One state of the five databases, and the directory of addresses."""

    emails: Table
    events: Table
    tasks: Table
    customers: Table
    plots: Table
    visits: Sequence[Row]
    """Analytics data: nothing changes it."""
    addresses: Sequence[str]

    def copy(self) -> Office:
        """The same state for a session of its own."""
        return Office(
            self.emails.copy(),
            self.events.copy(),
            self.tasks.copy(),
            self.customers.copy(),
            self.plots.copy(),
            self.visits,
            self.addresses,
        )

    def tables(self) -> dict[str, Table]:
        """All that tools can change."""
        return {
            "emails": self.emails,
            "calendar events": self.events,
            "project tasks": self.tasks,
            "customers": self.customers,
            "plots": self.plots,
        }


def difference(found: Office, expected: Office) -> str | None:
    """The first difference of two states, in a sentence; None where they are the same."""
    others = expected.tables()
    for name, table in found.tables().items():
        if sentence := _table_difference(table, others[name]):
            return f"{name}: {sentence}"
    return None


def _table_difference(found: Table, expected: Table) -> str | None:
    for row in expected:
        key = str(row[expected.key])
        other = found.get(key)
        if other is row:
            continue
        if other is None:
            return f"row {key} is missing"
        for column in expected.columns:
            if _folded(column, other[column]) != _folded(column, row[column]):
                return f"row {key}: {column} is {_said(other[column])}, expected {_said(row[column])}"
    for row in found:
        if expected.get(str(row[found.key])) is None:
            return f"row {row[found.key]} ought not to be there"
    return None


def _folded(column: str, value: str | None) -> str | None:
    return value if value is None or column in CASE_MATTERS else value.lower()


def _said(value: str | None) -> str:
    return "empty" if value is None else repr(value if len(value) <= 60 else f"{value[:57]}...")


# ---- from files

FOLDERS = ("", "processed", "raw")
"""Where in the folder of tables a file may lie; the last two are NeMo-Gym's."""
FILES = {
    "emails.csv": EMAIL_COLUMNS,
    "calendar_events.csv": EVENT_COLUMNS,
    "project_tasks.csv": TASK_COLUMNS,
    "customer_relationship_manager_data.csv": CUSTOMER_COLUMNS,
    "analytics_data.csv": VISIT_COLUMNS,
}
ADDRESSES = "email_addresses.csv"
"""One address a line, without a header."""


def read_office(folder: Path) -> Office:
    """An office from a folder of CSV files with NeMo-Gym's names and columns.

    Raises:
        TablesError: a file is missing, or has other columns, or a key twice.
    """
    emails, events, tasks, customers = (_keyed(folder, name) for name in list(FILES)[:4])
    visits = [row for _, row in _rows(folder, "analytics_data.csv")]
    lines = _place(folder, ADDRESSES).read_text(encoding="utf-8").splitlines()
    addresses = [line.strip() for line in lines if line.strip()]
    return Office(emails, events, tasks, customers, Table(PLOT_COLUMNS, {}), visits, addresses)


def _place(folder: Path, name: str) -> Path:
    for sub in FOLDERS:
        if (folder / sub / name).is_file():
            return folder / sub / name
    raise TablesError(f"{folder} has no table {name}; a folder of tables needs {', '.join((*FILES, ADDRESSES))}")


def _keyed(folder: Path, name: str) -> Table:
    columns, rows = FILES[name], dict[str, Row]()
    for where, row in _rows(folder, name):
        key = row[columns[0]]
        if key is None or not key.isdecimal():
            raise TablesError(f"{where}: {columns[0]} must be a number, not {key!r}")
        if key in rows:
            raise TablesError(f"{where}: {columns[0]} {key} is there twice")
        rows[key] = row
    return Table(columns, rows)


def _rows(folder: Path, name: str) -> Iterator[tuple[str, Row]]:
    """Place and content of each row; an empty cell is None."""
    file, columns = _place(folder, name), FILES[name]
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        lacking = [column for column in columns if column not in (reader.fieldnames or ())]
        if lacking:
            raise TablesError(f"{file} has no column {', '.join(lacking)}")
        for row in reader:
            yield f"{file}:{reader.line_num}", {column: row[column] or None for column in columns}
