"""Visits of the company's web site: counts by day, and plots, of which only the name is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from millrace.environments.workplace.tables import Office, Row
from millrace.environments.workplace.tool import ToolFailed, one_of, tool, within

VALUES = (
    "total_visits",
    "session_duration_seconds",
    "user_engaged",
    "visits_direct",
    "visits_referral",
    "visits_search_engine",
    "visits_social_media",
)
PLOT_TYPES = ("bar", "line", "scatter", "histogram")
SOURCES = ("direct", "referral", "search engine", "social media")
FIRST, LAST = "First day, YYYY-MM-DD; from the beginning when left out", "Last day, YYYY-MM-DD; up to now when left out"


@tool(
    "analytics_get_visitor_information_by_id",
    "Reads all visits of one visitor.",
    visitor_id="The visitor's id",
)
def get_visitor(office: Office, visitor_id: str) -> list[Row]:
    visits = [row for row in office.visits if row["visitor_id"] == visitor_id]
    if not visits:
        raise ToolFailed(f"there is no visitor {visitor_id[:40]}")
    return visits


@tool(
    "analytics_create_plot",
    "Plots a value over a range of days and returns the path of the picture.",
    time_min="First day, YYYY-MM-DD",
    time_max="Last day, YYYY-MM-DD",
    value_to_plot=f"The value: {', '.join(VALUES)}",
    plot_type=f"The kind of plot: {', '.join(PLOT_TYPES)}",
)
def create_plot(office: Office, time_min: str, time_max: str, value_to_plot: str, plot_type: str) -> str:
    one_of("value_to_plot", value_to_plot, VALUES)
    one_of("plot_type", plot_type, PLOT_TYPES)
    path = f"plots/{time_min}_{time_max}_{value_to_plot}_{plot_type}.png"
    office.plots.add({"file_path": path})
    return path


@tool("analytics_total_visits_count", "Counts all visits of each day.", time_min=FIRST, time_max=LAST)
def total_visits(office: Office, time_min: str | None = None, time_max: str | None = None) -> dict[str, int]:
    return {day: len(visits) for day, visits in _by_day(office, time_min, time_max)}


@tool("analytics_engaged_users_count", "Counts the engaged visitors of each day.", time_min=FIRST, time_max=LAST)
def engaged_users(office: Office, time_min: str | None = None, time_max: str | None = None) -> dict[str, int]:
    return {
        day: sum(visit["user_engaged"] == "True" for visit in visits)
        for day, visits in _by_day(office, time_min, time_max)
    }


@tool(
    "analytics_traffic_source_count",
    "Counts the visits of each day that came from one source.",
    time_min=FIRST,
    time_max=LAST,
    traffic_source=f"The source: {', '.join(SOURCES)}; all when left out",
)
def traffic_source(
    office: Office, time_min: str | None = None, time_max: str | None = None, traffic_source: str | None = None
) -> dict[str, int]:
    return {
        day: sum(traffic_source in (None, visit["traffic_source"]) for visit in visits)
        for day, visits in _by_day(office, time_min, time_max)
    }


@tool(
    "analytics_get_average_session_duration",
    "Computes the mean length of each day's visits in seconds.",
    time_min=FIRST,
    time_max=LAST,
)
def average_session(office: Office, time_min: str | None = None, time_max: str | None = None) -> dict[str, Any]:
    return {
        day: sum(float(visit["session_duration_seconds"] or 0) for visit in visits) / len(visits)
        for day, visits in _by_day(office, time_min, time_max)
    }


def _by_day(office: Office, first: str | None, last: str | None) -> Iterator[tuple[str, list[Row]]]:
    days: dict[str, list[Row]] = defaultdict(list)
    for visit in office.visits:
        if within(visit["date_of_visit"], first, last):
            days[str(visit["date_of_visit"])].append(visit)
    return iter(sorted(days.items()))
