"""Teachers behind servers: real fleets that talk to servers which a test scripts."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from millrace.config.schema import FleetConfig
from millrace.rollout.auth import TOKEN_VARIABLE
from millrace.rollout.client import RequestRefused
from millrace.rollout.fleet import Fleet
from millrace.stages.teachers import scored_together

Answer = Callable[[list[int]], tuple[int, float]]
"""Tokens -> status and the log-prob that each of them gets."""


@contextmanager
def engine_server(answer: Answer) -> Iterator[str]:
    """An engine that knows the routes of health, weight version and scoring."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/inference/v1/generate":
                self._reply(200, {})
                return
            tokens = body["token_ids"]
            status, value = answer(tokens)
            scores = [None, *({str(token): {"logprob": value}} for token in tokens[1:])]
            with suppress(BrokenPipeError, ConnectionResetError):  # the fleet may have given the request up
                self._reply(status, {"prompt_logprobs": scores})

        def _reply(self, status: int, said: object) -> None:
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Fleet]]:
    """A function from what a teacher answers to a fleet that asks it."""
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    with ExitStack() as stack:

        def serve(answer: Answer) -> Fleet:
            config = FleetConfig(engines=0, addresses=(stack.enter_context(engine_server(answer)),))
            fleet = stack.enter_context(Fleet(config, "model", tmp_path))
            fleet.wait_ready()
            fleet.serve_checkpoint()
            return fleet

        yield serve


def test_all_teachers_score_at_one_time(serve: Callable[[Answer], Fleet]) -> None:
    everyone = threading.Barrier(2, timeout=10)

    def teacher(value: float) -> Answer:
        def answer(tokens: list[int]) -> tuple[int, float]:
            everyone.wait()  # breaks, as does the test, when only one teacher is asked
            return 200, value

        return answer

    fleets = {"math": serve(teacher(-1.0)), "chat": serve(teacher(-2.0))}
    scores = scored_together(fleets, {"math": [[5, 6, 7]], "chat": [[8, 9]]})
    assert scores == {"math": [[0.0, -1.0, -1.0]], "chat": [[0.0, -2.0]]}


def test_when_one_teacher_refuses_the_others_are_not_waited_for(serve: Callable[[Answer], Fleet]) -> None:
    asked, over, answered = threading.Event(), threading.Event(), threading.Event()

    def slow(tokens: list[int]) -> tuple[int, float]:
        asked.set()
        over.wait(10)
        answered.set()
        return 200, -1.0

    def refuses(tokens: list[int]) -> tuple[int, float]:
        asked.wait(10)
        return 400, 0.0

    fleets = {"math": serve(refuses), "chat": serve(slow)}
    with pytest.raises(RequestRefused):
        scored_together(fleets, {"math": [[5, 6]], "chat": [[8, 9]]})
    assert not answered.is_set()
    over.set()
