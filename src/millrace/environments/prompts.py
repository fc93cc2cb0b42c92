"""The prompt of a data row: a string, or messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millrace.environments.base import Message

ROLES = ("system", "user", "assistant", "tool")


def prompt_problem(prompt: Any) -> str | None:
    """Why this cannot open an episode, in one sentence, or None."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "prompt is empty"
    if not isinstance(prompt, list) or not prompt:
        return f"prompt must be a string or a non-empty list of messages, not {type(prompt).__name__}"
    for position, message in enumerate(prompt):
        if not _is_message(message):
            return f"message {position} of the prompt must be {{'role': one of {ROLES}, 'content': a string}}"
    return None if prompt[-1]["role"] != "assistant" else "the prompt ends with the assistant's own message"


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") in ROLES and isinstance(message.get("content"), str)


def opening_messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
