"""A fleet that stays, with Python's own web server in place of vLLM's: what is shown is who has which port."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import waiting

from millrace.config.schema import FleetConfig
from millrace.rollout.auth import TOKEN_VARIABLE
from millrace.rollout.member import FleetError
from millrace.rollout.serve import StandingFleet

wait_until = partial(waiting.wait_until, limit=30.0)


def answers(address: str) -> bool:
    try:
        return httpx.get(address, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def place(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


def assert_taken(address: str) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(place(address))


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandingFleet]:
    def command(*_: object, host: str, port: int, **__: object) -> list[str]:
        return [sys.executable, "-m", "http.server", "--bind", host, "--directory", str(served), str(port)]

    (served := tmp_path / "served").mkdir()
    monkeypatch.setattr("millrace.rollout.engine.server_command", command)
    monkeypatch.setattr("millrace.rollout.engine.server_environment", lambda *_, **__: dict(os.environ))
    monkeypatch.setenv(TOKEN_VARIABLE, "of the test")
    found = StandingFleet(FleetConfig(engines=2, max_restarts=1), "model", tmp_path)
    found.start()
    yield found
    found.close()


@pytest.fixture
def watched(fleet: StandingFleet) -> Iterator[tuple[StandingFleet, list[str], list[FleetError]]]:
    """The fleet, what its watching says, and how it ended."""
    said, stop, failures = list[str](), threading.Event(), list[FleetError]()
    release = threading.Event()

    def watch() -> None:
        try:
            fleet.watch(stop, said.append)
        except FleetError as error:
            failures.append(error)
        release.wait(60)  # the kernel ends a server with the thread that started it

    thread = threading.Thread(target=watch)
    thread.start()
    yield fleet, said, failures
    stop.set()
    release.set()
    thread.join(30)


def test_a_server_that_ends_is_started_again_on_its_port_and_one_that_ends_again_is_the_end(
    watched: tuple[StandingFleet, list[str], list[FleetError]],
) -> None:
    fleet, said, failures = watched
    addresses = fleet.addresses
    wait_until(lambda: all(map(answers, addresses)))
    os.killpg(fleet.pids[0], signal.SIGKILL)
    wait_until(lambda: bool(said))
    assert said == [f"server 0 ({addresses[0]}) ended with exit status -9; it starts again"]
    wait_until(lambda: answers(addresses[0]))
    assert fleet.addresses == addresses

    os.killpg(fleet.pids[0], signal.SIGKILL)
    wait_until(lambda: bool(failures))
    assert f"server 0 ({addresses[0]}) ended 2 times. The last lines of " in str(failures[0])
    assert answers(addresses[1])


def test_a_port_is_its_servers_before_it_listens_and_while_it_is_dead(fleet: StandingFleet) -> None:
    address = fleet.addresses[0]
    assert_taken(address)
    wait_until(lambda: answers(address))
    os.killpg(fleet.pids[0], signal.SIGKILL)
    wait_until(lambda: not answers(address))
    assert_taken(address)


def test_ports_are_free_when_the_fleet_has_ended(fleet: StandingFleet) -> None:
    addresses = fleet.addresses
    wait_until(lambda: all(map(answers, addresses)))
    fleet.close()
    for address in addresses:
        with socket.create_server(place(address)):
            pass


def test_without_a_token_no_server_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(FleetError, match=f"{TOKEN_VARIABLE} is not set; set it to a secret of your own"):
        StandingFleet(FleetConfig(engines=1), "model", tmp_path)


def test_a_server_is_called_ready_once_it_answers_health(tmp_path: Path, fleet: StandingFleet) -> None:
    said, stop = list[str](), threading.Event()
    thread = threading.Thread(target=fleet.watch, args=(stop, said.append))
    thread.start()
    addresses = fleet.addresses
    wait_until(lambda: all(map(answers, addresses)))
    assert said == []
    (tmp_path / "served" / "health").write_text("it is")
    wait_until(lambda: len(said) == 2)
    stop.set()
    thread.join(30)
    assert sorted(said) == [f"server {index} ({address}) is ready" for index, address in enumerate(addresses)]
