"""The tools of the office together: their schemas, a call by name, the state that calls lead to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from millrace.environments.workplace import (  # noqa: F401  each registers its tools
    analytics_tools,
    calendar_tools,
    customer_tools,
    email_tools,
    project_tools,
)
from millrace.environments.workplace.tables import Office
from millrace.environments.workplace.tool import TOOLS, ToolFailed, as_text


def schemas(names: Iterable[str] = TOOLS) -> list[dict[str, Any]]:
    """The functions as chat templates are given them."""
    return [TOOLS[name].schema() for name in names]


def call(office: Office, name: str, arguments: Mapping[str, Any]) -> str:
    """Carry a call out; returns what the policy reads.

    Raises:
        ToolFailed: it changes nothing, and why.
    """
    if name not in TOOLS:
        raise ToolFailed(f"there is no tool {name[:60]}")
    return as_text(TOOLS[name].call(office, arguments))


def solved(office: Office, calls: Sequence[Mapping[str, str]]) -> Office:
    """The state behind the calls of a row's ground truth.

    Raises:
        ToolFailed: one of them fails; the text says which.
    """
    state = office.copy()
    for number, each in enumerate(calls):
        try:
            call(state, each["name"], json.loads(each["arguments"]))
        except ToolFailed as error:
            raise ToolFailed(f"ground_truth[{number}], {each['name']}, fails: {error}") from None
    return state
