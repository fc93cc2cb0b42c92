"""Where agents ask the policy: OpenAI's chat completions on rank 0, each API key one episode's.

An agent that cannot send a key of its own, since its model server has one for all, names its episode in the request's
`metadata`, under `millrace_episode`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from millrace.environments.base import EPISODE_FIELD, ModelAddress
from millrace.rollout.json_server import Call, JsonServer, Reply
from millrace.rollout.server import MODEL_NAME
from millrace.stages.chat_form import refusal

LOOPBACK = "127.0.0.1"

Complete = Callable[[Any], Awaitable[Reply]]
"""Answers the body of a request for a chat completion."""


class ChatEndpoint:
    """Listens while it is entered. `listen` is where the run's ranks meet when None; `domain` names it in messages."""

    def __init__(self, listen: str | None, port: int, domain: str) -> None:
        host = listen or os.environ.get("MASTER_ADDR", LOOPBACK)
        self._server = JsonServer(self._handle, host, port, f"the endpoint of domains.{domain}.agent")
        self._episodes: dict[str, Complete] = {}

    async def __aenter__(self) -> ChatEndpoint:
        await self._server.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.__aexit__(kind, error, trace)

    @contextmanager
    def seat(self, complete: Complete) -> Iterator[ModelAddress]:
        """Take requests of one episode, under a key that is forgotten with it."""
        key = secrets.token_urlsafe(24)
        self._episodes[key] = complete
        try:
            yield ModelAddress(f"{self._server.url}/v1", key, MODEL_NAME)
        finally:
            del self._episodes[key]

    async def _handle(self, call: Call) -> Reply:
        match call.method, call.path:
            case "GET", "/v1/models":
                return Reply(200, {"object": "list", "data": [{"id": MODEL_NAME, "object": "model"}]})
            case "POST", "/v1/chat/completions":
                complete = self._episodes.get(call.token) or self._episodes.get(_named(call.body))
                if complete is None:
                    return refusal(401, "the API key is that of no episode that is being played", "invalid_api_key")
                return await complete(call.body)
        return refusal(404, f"there is no {call.method} {call.path}, only POST /v1/chat/completions", "not_found")


def _named(body: Any) -> str:
    metadata = body.get("metadata") if isinstance(body, Mapping) else None
    named = metadata.get(EPISODE_FIELD) if isinstance(metadata, Mapping) else None
    return named if isinstance(named, str) else ""
