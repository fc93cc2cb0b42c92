"""An ASGI middleware that lets nobody use an engine without the run's token.

It stands in front of everything the server offers: sampling, the weight-update routes, the metrics, the documentation.
vLLM's own `--api-key` guards only some path prefixes and leaves the routes that change weights open. Only `/health`
answers without a token, so that a load balancer may ask it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

TOKEN_VARIABLE = "MILLRACE_FLEET_TOKEN"
"""Where a server finds the token that it asks for, and a trainer that of servers it did not start."""

OPEN_PATHS = frozenset({"/health"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequireToken:
    """Answers 401 to every request without `Authorization: Bearer TOKEN`; cannot be built without a token."""

    def __init__(self, app: App) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise RuntimeError(f"{TOKEN_VARIABLE} is not set; an engine without a token would be open to everybody")
        self._app = app
        self._expected = _digest(f"Bearer {token}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send)

    def _allowed(self, scope: Scope) -> bool:
        if scope["path"] in OPEN_PATHS and scope["type"] == "http":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(_digest(given), self._expected)


def _digest(header: bytes) -> bytes:
    # Hashed first, so that the comparison takes as long for a header of another length.
    return hashlib.sha256(header).digest()


async def _refuse(send: Send) -> None:
    body = json.dumps({"error": f"this server asks for the {TOKEN_VARIABLE} that it was started with"}).encode()
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
