"""Agents over HTTP: a real server with `/run`, whose agents ask the policy at the endpoint that they are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


@dataclass
class Asking:
    """How an agent asks the policy: as it is told in the row that it was given."""

    row: dict[str, Any]
    http: httpx.Client
    by_metadata: bool = False
    """Name the episode there, behind a key that is the same for all."""

    @property
    def opening(self) -> list[dict[str, Any]]:
        return list(self.row["responses_create_params"]["input"])

    def post(self, messages: list[dict[str, Any]], **more: Any) -> httpx.Response:
        model, body = self.row["model_server"], {"messages": messages, **more}
        body["model"] = model["model"]
        if self.by_metadata:
            body["metadata"] = self.row["responses_create_params"]["metadata"]
        key = "same for all" if self.by_metadata else model["api_key"]
        headers = {"Authorization": f"Bearer {key}"}
        return self.http.post(f"{model['base_url']}/chat/completions", json=body, headers=headers)

    def say(self, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The policy's message, which is put behind the others."""
        message = self.post(messages, **more).raise_for_status().json()["choices"][0]["message"]
        messages.append(message)
        return message


Agent = Callable[[Asking], float | tuple[int, Any]]
"""Drives one episode; its reward, or a status and a body."""


@dataclass
class AgentServer:
    url: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    most_at_one_time: int = 0
    running: int = 0


@contextmanager
def agent_server(agent: Agent) -> Iterator[AgentServer]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.rows.append(row)
                state.running += 1
                state.most_at_one_time = max(state.most_at_one_time, state.running)
            try:
                with httpx.Client(timeout=30, trust_env=False, verify=False) as http:
                    said = agent(Asking(row, http))
            except httpx.HTTPError as error:  # as agents are: what they cannot ask ends them
                said = 500, {"detail": str(error)}
            with lock:
                state.running -= 1
            status, body = said if isinstance(said, tuple) else (200, {**row, "reward": said})
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status if self.path == "/run" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    state = AgentServer(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
