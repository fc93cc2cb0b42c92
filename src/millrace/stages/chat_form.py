"""Requests and replies of OpenAI's chat completions, as an agent's client writes and reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from millrace.environments.answer import final_text, reasoning_text
from millrace.environments.base import Message
from millrace.environments.tool_calls import CALL_OPEN, ToolCallError, parse_tool_calls
from millrace.rollout.json_server import Reply
from millrace.rollout.server import MODEL_NAME

ROLES = {"developer": "system"}
"""Roles of OpenAI's that chat templates call something else."""


class BadRequest(Exception):
    """A request that cannot be served, in words for the agent's author."""


@dataclass(frozen=True)
class ChatRequest:
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]


def read_request(body: Any) -> ChatRequest:
    """What of a request counts. Parameters of sampling do not: the stage has its own.

    Raises:
        BadRequest: the request asks for another form of reply than one whole message, or is none.
    """
    if not isinstance(body, Mapping):
        raise BadRequest("the request must be a JSON object with messages")
    if body.get("stream"):
        raise BadRequest("replies are not streamed here; ask with stream false")
    if body.get("n") not in (None, 1):
        raise BadRequest("an episode has one continuation; ask with n 1")
    if body.get("tool_choice") not in (None, "auto"):
        raise BadRequest("the policy chooses for itself whether it calls a tool; ask with tool_choice auto")
    form = body.get("response_format")
    if form is not None and (not isinstance(form, Mapping) or form.get("type") != "text"):
        raise BadRequest("the policy is held to no response_format; leave it out")
    messages, tools = body.get("messages"), body.get("tools") or []
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRequest("tools must be a list of functions")
    return ChatRequest([_message(number, each) for number, each in enumerate(messages)], tools)


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRequest(f"message {number} has no role")
    role = message["role"]
    return {**message, "role": ROLES.get(role, role)}


def told(message: Message) -> str:
    """What a message says, so that two of them can be compared. Of the assistant's its final text and its calls alone:
    agents drop reasoning, write null for nothing and arguments anew."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", part)) if isinstance(part, Mapping) else str(part) for part in content)
    if message["role"] == "assistant":
        said: list[Any] = [final_text(str(content or "")).strip(), [_call(each) for each in _calls_of(message)]]
    else:
        said = [content, message.get("tool_call_id")]
    return json.dumps([message["role"], *said], sort_keys=True, default=str)


def _calls_of(message: Message) -> Sequence[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else ()


def _call(call: Any) -> list[Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return [call]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return [function.get("name"), arguments]
    return [function.get("name"), arguments]


def assistant_message(text: str, tools: Sequence[Mapping[str, Any]], turn: int) -> dict[str, Any]:
    """The policy's turn as an agent is given it: reasoning, final text and calls apart. Calls that cannot be read stay
    in the text, as servers leave them.

    Args:
        text: what the policy wrote, its reasoning included.
        turn: by which its calls are numbered.
    """
    content, reasoning = final_text(text), reasoning_text(text).strip("\n")
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    try:
        calls = parse_tool_calls(text, tools)
    except ToolCallError:
        return message
    if calls:
        message["content"] = content.partition(CALL_OPEN)[0].strip() or None
        message["tool_calls"] = [
            {
                "id": f"call_{turn}_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for number, call in enumerate(calls)
        ]
    return message


def completion(
    name: str, created: int, message: Mapping[str, Any], ended: Literal["stop", "length"], prompt: int, answer: int
) -> Reply:
    """A reply with the policy's message. `prompt` and `answer` count tokens."""
    reason = "tool_calls" if ended == "stop" and message.get("tool_calls") else ended
    return Reply(
        200,
        {
            "id": name,
            "object": "chat.completion",
            "created": created,
            "model": MODEL_NAME,
            "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
        },
    )


def refusal(status: int, sentence: str, code: str) -> Reply:
    return Reply(status, {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": code}})
