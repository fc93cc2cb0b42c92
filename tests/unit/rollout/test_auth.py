import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from millrace.rollout.auth import TOKEN_VARIABLE, RequireToken

Message = MutableMapping[str, Any]


def ask(path: str, header: str | None = None, *, kind: str = "http", method: str = "GET") -> list[Message]:
    """What a client sees that asks a guarded application which answers 200 to everything."""
    sent: list[Message] = []

    async def application(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [] if header is None else [(b"authorization", header.encode())]
    scope = {"type": kind, "path": path, "method": method, "headers": headers}
    asyncio.run(RequireToken(application)(scope, receive, send))
    return sent


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/collective_rpc", "/metrics", "/docs", "/health/", "/"])
@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "s3cret", "Basic s3cret", "Bearer s3cret "])
def test_everything_but_health_needs_the_token(path: str, header: str | None) -> None:
    assert ask(path, header)[0]["status"] == 401


def test_the_token_opens_and_health_is_open() -> None:
    assert ask("/collective_rpc", "Bearer s3cret")[0]["status"] == 200
    assert ask("/health")[0]["status"] == 200


def test_no_method_is_a_way_around() -> None:
    assert ask("/collective_rpc", method="OPTIONS")[0]["status"] == 401


def test_websockets_are_refused_too() -> None:
    assert ask("/health", kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_a_server_without_a_token_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(RuntimeError, match=TOKEN_VARIABLE):
        ask("/health")
