"""A tool: a function that the policy may call on an office, with its JSON schema made from its signature."""

from __future__ import annotations

import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from millrace.environments.workplace.tables import Office, Row, Table

MOST_ROWS_A_PAGE = 100


class ToolFailed(Exception):
    """A call that changes nothing; its text is what the policy is told."""


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: Mapping[str, str]
    """What each argument means."""
    integers: frozenset[str]
    """The arguments that are whole numbers; all others are text."""
    required: tuple[str, ...]
    run: Callable[..., Any]

    def schema(self) -> dict[str, Any]:
        """The function as a chat template is given it."""
        properties = {
            name: {"type": "integer" if name in self.integers else "string", "description": meaning}
            for name, meaning in self.parameters.items()
        }
        arguments = {"type": "object", "properties": properties, "required": list(self.required)}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {**arguments, "additionalProperties": False},
            },
        }

    def call(self, office: Office, arguments: Mapping[str, Any]) -> Any:
        """What the call gives back: text, or data for JSON. null and empty text stand for an argument left out.

        Raises:
            ToolFailed: an argument is unknown, missing or of the wrong type, or the tool refuses.
        """
        given = {}
        for name, value in arguments.items():
            if name not in self.parameters:
                raise ToolFailed(f"{self.name} has no argument {name[:40]}; it takes {', '.join(self.parameters)}")
            if value is not None and value != "":
                given[name] = self._integer(name, value) if name in self.integers else self._text(name, value)
        missing = [name for name in self.required if name not in given]
        if missing:
            raise ToolFailed(f"{self.name} needs {', '.join(missing)}")
        return self.run(office, **given)

    def _text(self, name: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole or (isinstance(value, float) and math.isfinite(value)):
            return str(value)
        raise ToolFailed(f"{name} must be text")

    def _integer(self, name: str, value: Any) -> int:
        if isinstance(value, str) and value.isdecimal() and len(value) <= 9:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ToolFailed(f"{name} must be a whole number from 1 on")
        return value


TOOLS: dict[str, Tool] = {}
"""All tools by name, in the order in which they are offered."""

Function = typing.TypeVar("Function", bound=Callable[..., Any])


def tool(name: str, description: str, /, **parameters: str) -> Callable[[Function], Function]:
    """Make a function a tool. `parameters` say what its arguments mean; those without a default are required."""

    def register(function: Function) -> Function:
        arguments = list(inspect.signature(function).parameters.values())[1:]
        assert [argument.name for argument in arguments] == list(parameters), name
        kinds = typing.get_type_hints(function)
        TOOLS[name] = Tool(
            name,
            description,
            parameters,
            frozenset(argument.name for argument in arguments if kinds[argument.name] is int),
            tuple(argument.name for argument in arguments if argument.default is inspect.Parameter.empty),
            function,
        )
        return function

    return register


def as_text(result: Any) -> str:
    """What a call gave back, as the policy reads it."""
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


# ---- what several tools do


def row_of(table: Table, key: str, what: str) -> Row:
    row = table.get(key)
    if row is None:
        raise ToolFailed(f"there is no {what} {key[:40]}")
    return row


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ToolFailed(f"{name} must be one of {', '.join(map(repr, choices))}")
    return value


def address(name: str, value: str) -> str:
    """An email address in small letters."""
    if "@" not in value or "." not in value:
        raise ToolFailed(f"{name} must be an email address")
    return value.lower()


def moment(name: str, value: str) -> datetime:
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is not None:
        raise ToolFailed(f"{name} must be a date or time such as 2023-12-01 09:30:00")
    return parsed


def holds(cell: str | None, wanted: str | None) -> bool:
    """Whether a cell has the text in it, capitals or not; no text is in every cell."""
    return wanted is None or wanted.lower() in (cell or "").lower()


def within(cell: str | None, least: str | None, most: str | None) -> bool:
    """Whether a cell's text, such as a date, lies between two bounds of its form. An empty cell lies in none."""
    if cell is None:
        return least is None and most is None
    return (least is None or cell >= least) and (most is None or cell <= most)


def page_of(name: str, rows: list[Row], page: int, page_size: int) -> dict[str, Any] | str:
    """One page of what a search found; the last one for a page behind it."""
    if not rows:
        return f"No {name} found."
    page_size = min(page_size, MOST_ROWS_A_PAGE)
    pages = math.ceil(len(rows) / page_size)
    page = min(page, pages)
    shown = rows[(page - 1) * page_size : page * page_size]
    about = {f"total_{name}": len(rows), "page": page, "page_size": page_size, "total_pages": pages}
    return {name: shown, "pagination": about}
