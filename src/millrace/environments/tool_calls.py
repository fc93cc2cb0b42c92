"""The tool calls in a policy's answer, in the two forms that chat templates teach.

    <tool_call>                                  <tool_call>
    {"name": "add", "arguments": {"a": 1}}       <function=add>
    </tool_call>                                 <parameter=a>
                                                 1
                                                 </parameter>
                                                 </function>
                                                 </tool_call>

The left one is JSON (Hermes, Qwen), the right one XML (Nemotron, Qwen-Coder). A call counts behind the reasoning only.
Time is linear in the answer, whatever it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.environments.answer import final_text
from millrace.errors import MillraceError

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
FUNCTION_CLOSE, PARAMETER_CLOSE = "</function>", "</parameter>"
_FUNCTION = re.compile(r"\s*<function=([^<>\s]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\s]+)>")
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}


class ToolCallError(MillraceError):
    """A call that cannot be read. Its text is meant for the policy: it says what is wrong and what is expected."""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


def parse_tool_calls(answer: str, tools: Sequence[Mapping[str, Any]] = ()) -> list[ToolCall]:
    """The calls of an answer in their order; none where it makes none.

    Args:
        answer: what the policy wrote, its reasoning included.
        tools: the functions as JSON schemas. The XML form has text alone; a value whose parameter is declared to be
            something else is read as JSON.

    Raises:
        ToolCallError: one of the calls cannot be read, so that none of them ought to be carried out.
    """
    declared = {str(function.get("name")): _properties(function) for function in map(_function, tools)}
    return [_call(block, declared) for block in _blocks(final_text(answer))]


def _blocks(text: str) -> list[str]:
    blocks = []
    for number, piece in enumerate(text.split(CALL_OPEN)[1:], start=1):
        block, closed, _ = piece.partition(CALL_CLOSE)
        if not closed:
            raise ToolCallError(f"tool call {number} does not end with {CALL_CLOSE}; write the whole call again")
        blocks.append(block.strip())
    return blocks


def _call(block: str, declared: Mapping[str, Mapping[str, Any]]) -> ToolCall:
    return _xml_call(block, declared) if block.startswith("<function") else _json_call(block)


def _json_call(block: str) -> ToolCall:
    try:
        call = _loads(block)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ToolCallError(
            f'the tool call is not valid JSON ({why}); write {{"name": NAME, "arguments": {{...}}}}'
        ) from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ToolCallError('the tool call has no "name"; write {"name": NAME, "arguments": {...}}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ToolCallError(f'the "arguments" of {call["name"]} must be a JSON object')
    return ToolCall(call["name"], arguments)


def _xml_call(block: str, declared: Mapping[str, Mapping[str, Any]]) -> ToolCall:
    opened = _FUNCTION.match(block)
    if opened is None:
        raise ToolCallError("the tool call must begin with <function=NAME>")
    name, at, arguments = opened.group(1), opened.end(), dict[str, Any]()
    while parameter := _PARAMETER.match(block, at):
        key = parameter.group(1)
        end = block.find(PARAMETER_CLOSE, parameter.end())
        if end < 0:
            raise ToolCallError(f"the parameter {key} of {name} does not end with {PARAMETER_CLOSE}")
        value = block[parameter.end() : end].removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(name, key, value, declared.get(name, {}).get(key))
        at = end + len(PARAMETER_CLOSE)
    if block[at:].strip() != FUNCTION_CLOSE:
        raise ToolCallError(
            f"the call of {name} has something else than parameters in it; write each value between <parameter=NAME> "
            f"and {PARAMETER_CLOSE}, and end with {FUNCTION_CLOSE}"
        )
    return ToolCall(name, arguments)


def _typed(function: str, key: str, value: str, schema: Any) -> Any:
    """A parameter's text as its declared type; text where it is text, or may be, or is not declared."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    named = [kinds] if isinstance(kinds, str) else list(kinds or ())
    unknown = any(kind not in (*_KINDS, "string") for kind in named)
    if not named or unknown or ("string" in named and value != "null"):
        return value
    try:
        read = _loads(value)
    except (ValueError, RecursionError):
        read = {"True": True, "False": False, "None": None}.get(value.strip(), value)
    if any(_is(read, kind) for kind in named):
        return read
    if "string" in named:
        return value
    raise ToolCallError(f"the parameter {key} of {function} must be of type {' or '.join(named)}, not {value[:80]!r}")


def _loads(text: str) -> Any:
    """JSON whose strings are text: it can also name half of a surrogate pair, and a tool that shows that again says
    what has no tokens. Raises ValueError or RecursionError."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":
        return False
    return kind != "string" and isinstance(value, _KINDS[kind])


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = tool.get("function", tool)
    return inner if isinstance(inner, Mapping) else {}


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}
