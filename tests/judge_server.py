"""A tiny OpenAI-compatible server whose verdicts a test scripts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """What the server says to one request: a verdict's text, or another status, or nothing for a while."""

    text: str | None = None
    status: int = 200
    raw: str | None = None
    """A body in place of a chat completion."""
    finish_reason: str = "stop"
    delay: float = 0.0


@dataclass
class JudgeServer:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_one_time: int = 0
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, request: dict[str, Any], key: str | None) -> None:
        with self._lock:
            self.requests.append(request)
            self.keys.append(key)
            self._running += 1
            self.most_at_one_time = max(self.most_at_one_time, self._running)

    def end(self) -> None:
        with self._lock:
            self._running -= 1


@contextmanager
def judge_server(answer: Callable[[dict[str, Any]], Said]) -> Iterator[JudgeServer]:
    """`answer(request body)` says what comes back."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self._reply(404, "{}")
                return
            state.begin(body, self.headers.get("Authorization"))
            try:
                said = answer(body)
                time.sleep(said.delay)
                self._reply(said.status, completion(said) if said.raw is None else said.raw)
            except (BrokenPipeError, ConnectionResetError):  # the client gave the request up
                self.close_connection = True
            finally:
                state.end()

        def _reply(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 256  # all requests of a group come at one time

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = JudgeServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(said: Said) -> str:
    message = {"role": "assistant", "content": said.text}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": said.finish_reason}]})


def verdict(score_1: float, score_2: float, ranking: float) -> str:
    return json.dumps({"score_1": score_1, "score_2": score_2, "ranking": ranking})


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """The two answers of a request in the roles form."""
    by_role = {message["role"]: message["content"] for message in request["messages"]}
    return by_role["response_1"], by_role["response_2"]
