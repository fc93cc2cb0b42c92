"""The calendar."""

from __future__ import annotations

from typing import Any

from millrace.environments.workplace.tables import EVENT_COLUMNS, Office, Row
from millrace.environments.workplace.tool import ToolFailed, holds, moment, one_of, page_of, row_of, tool

CHANGEABLE = EVENT_COLUMNS[1:]


@tool(
    "calendar_get_event_information_by_id",
    "Reads one field of a calendar event.",
    event_id="The event's id, eight digits",
    field=f"The field: {', '.join(EVENT_COLUMNS)}",
)
def get_event(office: Office, event_id: str, field: str) -> dict[str, Any]:
    row = row_of(office.events, event_id, "event")
    return {field: row[one_of("field", field, EVENT_COLUMNS)]}


@tool(
    "calendar_search_events",
    "Searches the calendar; the latest events come first.",
    query="Text in the event's name or the participant's address; all events when left out",
    time_min="Events that start at this time or later, YYYY-MM-DD HH:MM:SS",
    time_max="Events that start at this time or earlier, YYYY-MM-DD HH:MM:SS",
    page="Which page of the result",
    page_size="Events on a page",
)
def search_events(
    office: Office,
    query: str = "",
    time_min: str | None = None,
    time_max: str | None = None,
    page: int = 1,
    page_size: int = 5,
) -> Any:
    first = moment("time_min", time_min) if time_min else None
    last = moment("time_max", time_max) if time_max else None

    def wanted(row: Row) -> bool:
        start = moment("event_start", str(row["event_start"]))
        in_time = (first is None or start >= first) and (last is None or start <= last)
        return in_time and (holds(row["event_name"], query) or holds(row["participant_email"], query))

    found = [row for row in office.events if wanted(row)]
    found.sort(key=lambda row: moment("event_start", str(row["event_start"])), reverse=True)
    return page_of("events", found, page, page_size)


@tool(
    "calendar_create_event",
    "Puts an event into the calendar and returns its id.",
    event_name="Name of the event",
    participant_email="Address of the participant",
    event_start="When it starts, YYYY-MM-DD HH:MM:SS",
    duration="Minutes that it takes",
)
def create_event(office: Office, event_name: str, participant_email: str, event_start: str, duration: str) -> str:
    values = {"event_start": event_start, "duration": duration}
    values |= {"event_name": event_name, "participant_email": participant_email}
    return office.events.add({column: _checked(column, value) for column, value in values.items()})


@tool("calendar_delete_event", "Deletes a calendar event.", event_id="The event's id, eight digits")
def delete_event(office: Office, event_id: str) -> str:
    row_of(office.events, event_id, "event")
    office.events.remove(event_id)
    return "The event was deleted."


@tool(
    "calendar_update_event",
    "Changes one field of a calendar event.",
    event_id="The event's id, eight digits",
    field=f"The field: {', '.join(CHANGEABLE)}",
    new_value="What it is to be",
)
def update_event(office: Office, event_id: str, field: str, new_value: str) -> str:
    value = _checked(one_of("field", field, CHANGEABLE), new_value)
    row_of(office.events, event_id, "event")
    office.events.change(event_id, field, value)
    return "The event was changed."


def _checked(column: str, value: str) -> str:
    """A value as it is stored: as it was given, an address in small letters."""
    if column == "event_start":
        moment(column, value)
    if column == "duration" and not (value.isdecimal() and int(value[:9]) > 0):
        raise ToolFailed("duration must be a number of minutes, above 0")
    return value.lower() if column == "participant_email" else value
