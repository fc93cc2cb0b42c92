"""The JSON server behind the chat endpoint: real sockets, whole requests and broken ones."""

import asyncio
import contextlib
import json
import socket

import httpx
import pytest

from millrace.errors import MillraceError
from millrace.rollout import json_server
from millrace.rollout.json_server import JsonServer, Reply


async def echo(call):
    return Reply(201, {"method": call.method, "path": call.path, "token": call.token, "body": call.body})


def with_server(use, handle=echo):
    """What `use(server)` returns."""

    async def served():
        async with JsonServer(handle, "127.0.0.1", 0, "the echo") as server:
            return await use(server)

    return asyncio.run(asyncio.wait_for(served(), 10))


HEAD_THEN_GET = b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def address(server):
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


async def raw(server, content):
    """What comes back for bytes, until the server closes."""
    reader, writer = await asyncio.open_connection(*address(server))
    writer.write(content)
    writer.write_eof()
    reply = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return reply


def test_requests_of_one_connection_are_answered_in_turn_with_their_token_and_body():
    async def use(server):
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            headers = {"Authorization": "Bearer k1"}
            first = await http.post(f"{server.url}/a?b=c", json={"text": "漢"}, headers=headers)

            async def pieces():
                for piece in (b'{"big"', b': "', b"x" * 300_000, b'"}'):
                    yield piece

            second = await http.post(f"{server.url}/b", content=pieces(), headers={"Authorization": "Basic k1"})
            third = await http.get(f"{server.url}/c")
            return first, second, third

    first, second, third = with_server(use)
    assert first.status_code == 201 and first.headers["content-type"] == "application/json"
    assert first.json() == {"method": "POST", "path": "/a", "token": "k1", "body": {"text": "漢"}}
    assert len(second.json()["body"]["big"]) == 300_000 and second.json()["token"] == ""
    assert third.json() == {"method": "GET", "path": "/c", "token": "", "body": None}


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n{"a"', b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n" + b" " * 2000, b"413"),
        (b"no request at all\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\n\r\n", b"400"),  # HTTP/1.1 without a host
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b"400"),  # it hangs up in the middle
        (b"", b""),
    ],
)
def test_what_is_no_request_is_refused_and_the_next_client_is_served(monkeypatch, content, status):
    monkeypatch.setattr(json_server, "MOST_BODY_BYTES", 1000)

    async def use(server):
        broken = await raw(server, content)
        good = await raw(server, b"GET /ok HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return broken, good

    broken, good = with_server(use)
    assert broken.split(b"\r\n")[0].split(b" ")[1:2] == ([status] if status else [])
    assert json.loads(good.split(b"\r\n\r\n")[1])["path"] == "/ok"


def test_the_end_breaks_off_what_is_under_way_at_once():
    async def never(call):
        await asyncio.sleep(60)
        return Reply(200, {})

    async def use(server):
        async def ask():
            async with httpx.AsyncClient(trust_env=False, verify=False) as http:
                await http.get(f"{server.url}/")

        task = asyncio.ensure_future(ask())
        await asyncio.sleep(0.1)
        return task

    async def served():
        async with JsonServer(never, "127.0.0.1", 0, "the sleeper") as server:
            task = await use(server)
        with pytest.raises(httpx.HTTPError):
            await asyncio.wait_for(task, 5)

    asyncio.run(served())


@pytest.mark.parametrize("loops", range(8))
def test_a_connection_that_is_taken_in_the_moment_of_the_end_is_ended_too(loops):
    async def served():
        async with JsonServer(echo, "127.0.0.1", 0, "the echo") as server:
            client = socket.create_connection(address(server))
            for _ in range(loops):
                await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        client.close()
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(served()) == set()


def test_a_client_that_reads_no_more_does_not_hold_the_end():
    async def much(call):
        return Reply(200, {"text": "x" * (32 << 20)})

    async def use(server):
        client = socket.create_connection(address(server))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.2)
        return client

    with with_server(use, much) as client, contextlib.suppress(ConnectionResetError):
        client.settimeout(5)
        assert sum(len(piece) for piece in iter(lambda: client.recv(1 << 20), b"")) < 32 << 20


def test_a_request_for_the_head_gets_no_body_and_the_next_one_is_answered():
    both = with_server(lambda server: raw(server, HEAD_THEN_GET))
    assert both.count(b"HTTP/1.1 201") == 2 and both.count(b'"path"') == 1


def test_a_port_that_is_taken_is_named():
    async def use(server):
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(MillraceError, match=rf"the other cannot listen on 127.0.0.1 port {port}: .*in use"):
            await JsonServer(echo, "127.0.0.1", port, "the other").__aenter__()

    with_server(use)
