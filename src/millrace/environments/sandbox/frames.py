"""Messages between a verifier and a server of programs on another node: a length, and so many bytes of JSON."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

LENGTH = struct.Struct("!I")


def pack(message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader, most: int = 1 << 32) -> dict[str, Any] | None:
    """The next message; None when the connection has ended, or what comes is none, or one of more than `most` bytes."""
    try:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return dict(json.loads(await reader.readexactly(size))) if size <= most else None
    except (asyncio.IncompleteReadError, OSError, ValueError, TypeError, RecursionError):
        return None


def ask(address: tuple[str, int], message: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
    """The answer to one message, over a connection of its own and outside of any event loop. Raises OSError."""
    with socket.create_connection(address, limit_s) as channel, channel.makefile("rb") as replies:
        channel.sendall(pack(message))
        head = replies.read(LENGTH.size)
        size = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else 0
        body = replies.read(size)
        if not body or len(body) < size:
            raise ConnectionResetError(f"{address[0]}:{address[1]} closed the connection")
    try:
        return dict(json.loads(body))
    except (ValueError, TypeError):
        raise ConnectionError(f"{address[0]}:{address[1]} answers with what is no message") from None
