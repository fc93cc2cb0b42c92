"""The messages of a conversation as data sets write them, brought into the one form that chat templates read.

An assistant's reasoning may stand in `reasoning_content` (or `reasoning`), or as `<think>...</think>` before the rest
of the content. A template reads the one or the other; here each is turned into what the template reads, so that no
reasoning is lost and none is rendered twice.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.data.errors import DataError

Message = Mapping[str, Any]
Messages = Sequence[Message]
"""[{"role": ..., "content": ...}, ...]; an assistant's message may also have `reasoning_content`, `tool_calls`, and
`"train": false` or `"weight": 0` to be left out of the loss."""
Tools = Sequence[Mapping[str, Any]]
"""Functions that the assistant may call, as OpenAI's API describes them: {"type": "function", "function": {"name",
"description", "parameters": JSON Schema}}, or what stands in `function` alone."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
REASONING_FIELDS = ("reasoning_content", "reasoning")
MASK_FIELDS = ("train", "weight")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""The usual roles. Others are left to the chat template, but for those that look like one of these misspelt."""


def messages_problem(messages: Any) -> str | None:
    """What is wrong with the messages of a conversation, in one sentence, or None."""
    if not isinstance(messages, list) or not messages:
        return "the field 'messages' must be a list of at least one message"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} has no 'role'"
        if problem := _role_problem(message["role"]):
            return f"message {number}: {problem}"
        if message.get("content") is None and not message.get("tool_calls") and _reasoning_field(message) is None:
            return f"message {number} has no 'content'"
        if problem := _mask_problem(message):
            return f"message {number}: {problem}"
    return None


def form_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row's `thinking` and `tools`, in one sentence, or None."""
    if not isinstance(row.get("thinking"), bool | None):
        return f"the field 'thinking' must be true or false, not {row['thinking']!r}"
    tools = row.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        return f"the field 'tools' must be a list of functions, not {_kind(tools)}"
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return f"tool {number} has no 'name'; a tool is {{'name', 'description', 'parameters'}}"
    return None


def is_trained(message: Message) -> bool:
    """Whether an assistant's message is trained on when it says nothing else."""
    return message.get("train") is not False and message.get("weight") != 0


def has_reasoning(message: Message) -> bool:
    """Whether the assistant reasoned before this message, or began to."""
    if _reasoning_field(message) is not None:
        return True
    content = message.get("content")
    return isinstance(content, str) and (bool(_split(content)[0]) or THINK_OPEN in _split(content)[1])


def for_template(messages: Messages, *, reads_reasoning: bool, without_reasoning: bool = False) -> list[dict[str, Any]]:
    """The messages as a chat template is given them.

    Args:
        reads_reasoning: the template reads `reasoning_content`, so that reasoning goes there; else into the content.
        without_reasoning: leave all reasoning out.

    Raises:
        DataError: content that is no text, arguments of a tool call that are no JSON object, or reasoning given twice.
    """
    prepared = []
    for number, message in enumerate(messages):
        try:
            prepared.append(_prepared(message, reads_reasoning, without_reasoning))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from error
    return prepared


def _prepared(message: Message, reads_reasoning: bool, without_reasoning: bool) -> dict[str, Any]:
    # A table format writes null where a message lacks a field that another one has.
    plain = {key: value for key, value in message.items() if value is not None and key not in MASK_FIELDS}
    plain["content"] = _text(message.get("content"))
    if plain["role"] != "assistant":
        return plain
    if calls := plain.get("tool_calls"):
        if not isinstance(calls, list):
            raise DataError(f"its tool_calls must be a list, not {_kind(calls)}")
        plain["tool_calls"] = [_call(call) for call in calls]
    return _with_reasoning(plain, reads_reasoning, without_reasoning)


def _with_reasoning(message: dict[str, Any], reads_reasoning: bool, without_reasoning: bool) -> dict[str, Any]:
    content, field = message["content"], _reasoning_field(message)
    inside, rest = _split(content) if content is not None else ("", content)
    if field is not None and inside:
        raise DataError(f"it has {field} and a {THINK_CLOSE} in its content; keep one of them")
    reasoning = inside if field is None else message[field]
    plain = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    if without_reasoning:
        return {**plain, "content": rest}
    if reads_reasoning:
        return {**plain, "content": rest, **({"reasoning_content": reasoning} if reasoning else {})}
    if field is not None:
        return {**plain, "content": f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{content or ''}"}
    return plain


def _reasoning_field(message: Message) -> str | None:
    """The field that holds reasoning, if one holds any."""
    for name in REASONING_FIELDS:
        if isinstance(message.get(name), str) and message[name].strip():
            return name
    return None


def _split(content: str) -> tuple[str, str]:
    """Reasoning and answer of a content with `</think>` (the `<think>` may have stood in the prompt); else "" and all.

    An empty block is no reasoning.
    """
    before, closed, after = content.rpartition(THINK_CLOSE)
    if not closed:
        return "", content
    reasoning = before.lstrip().removeprefix(THINK_OPEN).strip("\n")
    return (reasoning if reasoning.strip() else ""), after.lstrip("\n")


def _text(content: Any) -> str | None:
    """A content that is a string, or a list of parts whose texts are joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise DataError(f"its content must be text, not {_kind(content)}")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"its content has a part of type {part.get('type')!r}, but only text can be read")
    return "".join(part["text"] for part in content)


def _call(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object, where OpenAI's API has them as JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("a tool call has no 'name'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"the arguments of {function['name']} are not valid JSON: {why}") from error
    if not isinstance(arguments, Mapping | None):
        raise DataError(f"the arguments of {function['name']} must be an object, not {_kind(arguments)}")
    outer = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    return {"type": "function", **outer, "function": {**function, "arguments": dict(arguments or {})}}


def _role_problem(role: str) -> str | None:
    """A misspelt role: many templates would render it without a word, and its message would never be trained on."""
    near = [] if role in ROLES else difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=0.8)
    return f"the role {role!r} is not known; did you mean {near[0]!r}?" if near else None


def _mask_problem(message: Message) -> str | None:
    train, weight = message.get("train"), message.get("weight")
    if not isinstance(train, bool | None):
        return f"'train' must be true or false, not {train!r}"
    if weight not in (None, 0, 1):
        return f"'weight' must be 0 or 1, not {weight!r}"
    if train and message["role"] != "assistant":
        return f"'train' is true, but only an assistant's message is trained on, and this is of the {message['role']}"
    if train is not None and weight is not None and train != bool(weight):
        return "'train' and 'weight' contradict each other; keep one of them"
    return None


def _kind(value: Any) -> str:
    match value:
        case str():
            return "text"
        case Mapping():
            return "an object"
        case list():
            return "a list"
    return repr(value)
