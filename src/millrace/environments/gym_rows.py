"""NeMo-Gym rows, read as they are released.

Such a row holds its prompt in `responses_create_params`, a request of OpenAI's Responses API, beside the fields that
the verifier needs and an `agent_ref` that routes it in NeMo-Gym. Here the recipe's domain routes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millrace.errors import MillraceError

REQUEST = "responses_create_params"
NESTED = "verifier_metadata"
"""Where newer instruction-following rows keep the verifier's fields."""

GRADED_CALLS = "ground_truth"
"""What a row has whose tools are played here (`workplace_assistant`)."""

ROLES = {"developer": "system"}
"""Roles of the Responses API that chat templates call something else."""

TEXT_PARTS = ("input_text", "output_text", "text")

Row = Mapping[str, Any]


class GymRowError(MillraceError):
    """A row that asks for what no environment here can play."""


def plain_row(row: Row) -> Row:
    """A NeMo-Gym row with `prompt` as messages, perhaps `tools`, and the verifier's fields on top; any other row as it
    is. Fields that are null, as a table format writes the absent ones, are left out. An `expected_answer` is also there
    as `answer`.

    Raises:
        GymRowError: the request has no input, tools without calls to grade by, or content that is no text.
    """
    request = row.get(REQUEST)
    if "expected_answer" in row:
        row = {"answer": row["expected_answer"], **row}
    if request is None:
        return row
    messages = request_messages(request)
    nested = row.get(NESTED)
    fields = {**row, **(nested if isinstance(nested, Mapping) else {})}
    fields = {name: value for name, value in fields.items() if value is not None and name not in (REQUEST, NESTED)}
    if tools := request_tools(request):
        fields["tools"] = tools
        if GRADED_CALLS not in fields:
            raise GymRowError(
                f"{REQUEST} offers {len(tools)} tools, but the row has no {GRADED_CALLS}, by which calls are "
                "graded; leave the row out"
            )
    return {**fields, "prompt": messages}


def request_tools(request: Row) -> list[dict[str, Any]]:
    """The functions of a request as chat templates are given them: what they are stands in `function`."""
    given = request.get("tools") or []
    if not isinstance(given, list):
        raise GymRowError(f"{REQUEST}.tools must be a list of functions, not {type(given).__name__}")
    for position, each in enumerate(given):
        if not isinstance(each, Mapping) or each.get("type") != "function" or not isinstance(each.get("name"), str):
            raise GymRowError(f"{REQUEST}.tools[{position}] is no function with a name; leave the row out")
    parts = ("name", "description", "parameters")
    return [{"type": "function", "function": {part: each[part] for part in parts if part in each}} for each in given]


def request_messages(request: Any) -> list[dict[str, str]]:
    """The messages that a request opens with. Raises GymRowError where they are none."""
    if not isinstance(request, Mapping):
        raise GymRowError(f"{REQUEST} must be an object with 'input', not {request!r}")
    given = request.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise GymRowError(f"{REQUEST}.input must be a string or a non-empty list of messages, not {given!r}")
    instructions = request.get("instructions")
    opening = [{"role": "system", "content": instructions}] if instructions else []
    return opening + [_message(item, f"{REQUEST}.input[{position}]") for position, item in enumerate(items)]


def _message(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, Mapping) or item.get("type", "message") not in ("message", None):
        kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
        raise GymRowError(f"{where} is a {kind}, but only messages can open an episode; leave the row out")
    role = item.get("role")
    if not isinstance(role, str):
        raise GymRowError(f"{where} has no role")
    return {"role": ROLES.get(role, role), "content": _text(item.get("content"), where)}


def _text(content: Any, where: str) -> str:
    """A content that is a string, or a list of parts whose texts are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise GymRowError(f"{where}.content must be a string or a list of parts, not {content!r}")
    for part in content:
        if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise GymRowError(f"{where}.content has a part of type {part.get('type')!r}, but only text can be read")
    return "".join(part["text"] for part in content)
