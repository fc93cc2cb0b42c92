"""A small HTTP/1.1 server: JSON in, JSON out, each request with its bearer token. h11 reads and writes the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import h11

from millrace.errors import MillraceError

MOST_BODY_BYTES = 64 << 20
READ_BYTES = 1 << 16
BACKLOG = 4096
"""Connections that may wait to be taken: thousands of agents begin at one time."""
IDLE_SECONDS = 600.0
"""So long a client may take to send its next request, or the rest of one."""

log = logging.getLogger("millrace.rollout")


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    """Without what stands behind a question mark."""
    token: str
    """Of the `Authorization: Bearer` header; empty without one."""
    body: Any
    """What the JSON holds; None without a body."""


@dataclass(frozen=True)
class Reply:
    status: int
    body: Mapping[str, Any]


class Unreadable(Exception):
    """A request that is not answered by the handler, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class JsonServer:
    """Answers with what `handle` returns while it is entered. It belongs to the event loop it is entered in.

    Args:
        host, port: where it listens; any free port when 0.
        what: names it in messages.
    """

    def __init__(self, handle: Callable[[Call], Awaitable[Reply]], host: str, port: int, what: str) -> None:
        self._handle, self._host, self._port, self._what = handle, host, port, what
        self._server: asyncio.Server | None = None
        self._ended = False
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> JsonServer:
        """Raises MillraceError when it cannot listen there."""
        try:
            self._server = await asyncio.start_server(self._connected, self._host, self._port, backlog=BACKLOG)
        except OSError as error:
            raise MillraceError(
                f"{self._what} cannot listen on {self._host} port {self._port}: {error.strerror or error}"
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Breaks off the connections that are open."""
        assert self._server is not None
        self._ended = True
        self._server.close()
        for task in self._connections:
            task.cancel()
        # Not `wait_closed`, which from Python 3.12 on waits for clients too: one that reads no more would hold the run.
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return f"http://[{self._host}]:{port}" if ":" in self._host else f"http://{self._host}:{port}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._ended:  # it was taken in the moment of the end
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await _Connection(reader, writer, self._handle).serve()
        except (ConnectionError, TimeoutError):
            log.debug("%s: a client left", self._what)
        except asyncio.CancelledError:  # asyncio would report it, though it is how the server ends its connections
            log.debug("%s: a connection is broken off", self._what)
            writer.transport.abort()  # what the client does not read would keep it open
        finally:
            self._connections.discard(task)
            writer.close()


class _Connection:
    """One client's requests, one after the other."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handle: Callable[[Call], Awaitable[Reply]],
    ) -> None:
        self._reader, self._writer, self._handle = reader, writer, handle
        self._protocol = h11.Connection(h11.SERVER)

    async def serve(self) -> None:
        while True:
            try:
                call = await self._next_call()
            except Unreadable as error:
                await self._send(Reply(error.status, {"error": {"message": str(error), "type": "invalid_request"}}))
                return
            except h11.RemoteProtocolError as error:
                if self._protocol.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    await self._send(Reply(error.error_status_hint, {"error": {"message": str(error)}}))
                return
            if call is None:
                return
            await self._send(await self._handle(call), head=call.method == "HEAD")
            if self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
                return
            self._protocol.start_next_cycle()

    async def _next_call(self) -> Call | None:
        """The next request; None when the client closed the connection."""
        request = await self._event()
        if not isinstance(request, h11.Request):
            return None
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > MOST_BODY_BYTES:
                raise Unreadable(413, f"the request has more than {MOST_BODY_BYTES} bytes")
        headers = {name: value.decode("latin-1") for name, value in request.headers}
        scheme, _, token = headers.get(b"authorization", "").partition(" ")
        try:
            content = json.loads(body) if body else None
        except (ValueError, RecursionError) as error:
            raise Unreadable(400, f"the request's body is not JSON: {error}") from error
        return Call(
            request.method.decode("ascii"),
            request.target.decode("latin-1").partition("?")[0],
            token.strip() if scheme.lower() == "bearer" else "",
            content,
        )

    async def _event(self) -> Any:
        while True:
            event = self._protocol.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._protocol.they_are_waiting_for_100_continue:
                await self._write(h11.InformationalResponse(status_code=100, headers=[]))
            async with asyncio.timeout(IDLE_SECONDS):
                self._protocol.receive_data(await self._reader.read(READ_BYTES))

    async def _send(self, reply: Reply, *, head: bool = False) -> None:
        content = json.dumps(reply.body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content)))]
        with contextlib.suppress(ConnectionError):  # the client need not have waited
            await self._write(h11.Response(status_code=reply.status, headers=headers))
            if not head:
                await self._write(h11.Data(data=content))
            await self._write(h11.EndOfMessage())

    async def _write(self, event: Any) -> None:
        self._writer.write(self._protocol.send(event) or b"")
        await self._writer.drain()
