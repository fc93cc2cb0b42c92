"""Engines on another node, with commands of their own in place of the servers."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import is_running, wait_until

from millrace.config.placement import NodeRanks, Placement, ServerPlace, write_placement
from millrace.config.schema import FleetConfig, ModelConfig, Recipe, RlStage
from millrace.rollout.agent import Agent
from millrace.rollout.fleet import Fleet
from millrace.rollout.member import FleetError
from millrace.rollout.placement import fleet_seats, judge_seats, teacher_seats
from millrace.rollout.remote import LOST, RemoteEngine
from millrace.rollout.rendezvous import RENDEZVOUS_VARIABLE, Failure, NodeState, Rendezvous

PLACES = (
    ServerPlace(kind="engine", index=0, node=1, gpus=(0,)),
    ServerPlace(kind="engine", index=1, node=2, gpus=(0,)),
    ServerPlace(kind="judge-small", index=0, node=1, gpus=(1,)),
    ServerPlace(kind="teacher", index=0, node=1, gpus=(2,)),
    ServerPlace(kind="teacher", index=1, node=2, gpus=(2,)),
)
SERVER = """
import os, sys, time
print("serving at", sys.argv[1], "with a token of", len(os.environ["MILLRACE_FLEET_TOKEN"]), flush=True)
time.sleep(60)
"""


@pytest.fixture
def meeting(tmp_path: Path) -> Rendezvous:
    found = Rendezvous(tmp_path / "launch" / "7.0")
    found.open()
    found.make_token()
    trainer = (NodeRanks(node=0, first_rank=0, ranks=1),)
    write_placement(tmp_path / "launch" / "placement.json", Placement(nodes=3, trainer=trainer, servers=PLACES))
    for number in range(3):
        found.announce(NodeState(node=number, host=f"n{number}", address=f"127.0.0.{11 + number}"))
    return found


@pytest.fixture
def agent(tmp_path: Path, meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Thread]:
    """The agent of node 1, until the job is over."""

    def command(*_: object, host: str, port: int, **__: object) -> list[str]:
        return [sys.executable, "-c", SERVER, f"{host}:{port}"]

    monkeypatch.setattr("millrace.rollout.engine.server_command", command)
    monkeypatch.setattr("millrace.rollout.engine.server_environment", environment)
    agent = Agent(tmp_path, meeting, 1, "127.0.0.12")
    thread = threading.Thread(target=agent.run, args=(lambda: meeting.over,))
    thread.start()
    yield thread
    meeting.end(0)
    thread.join(30)


def environment(*_: object, token: str, **__: object) -> dict[str, str]:
    return {**os.environ, "MILLRACE_FLEET_TOKEN": token}


def engine_of(tmp_path: Path, meeting: Rendezvous, place: ServerPlace = PLACES[0]) -> RemoteEngine:
    return RemoteEngine(place.index, FleetConfig(), "model", tmp_path, meeting, place)


def test_an_engine_is_started_watched_killed_started_anew_and_stopped_on_its_node(
    tmp_path: Path, meeting: Rendezvous, agent: threading.Thread
) -> None:
    engine = engine_of(tmp_path, meeting)
    engine.spawn()
    wait_until(lambda: "serving" in engine.log_tail())
    wait_until(lambda: is_running(engine.pid))
    first, url = engine.pid, engine.url
    assert engine.exit_code() is None
    assert engine.log_tail() == f"serving at {url.removeprefix('http://')} with a token of {len(meeting.token())}"
    assert url.startswith("http://127.0.0.12:") and engine.name == f"engine 0 ({url})"

    engine.kill()
    wait_until(lambda: engine.exit_code() is not None)
    assert not is_running(first)

    engine.spawn()
    assert engine.exit_code() is None  # what is known of the first is not taken for the second
    wait_until(lambda: "serving" in engine.log_tail())
    assert engine.url != url and engine.log_tail().count("serving") == 1
    wait_until(lambda: is_running(engine.pid))
    second = engine.pid
    engine.stop()
    assert engine.exit_code() is not None and not is_running(second)


def test_a_later_user_of_a_place_follows_on_the_one_before(
    tmp_path: Path, meeting: Rendezvous, agent: threading.Thread
) -> None:
    engine_of(tmp_path, meeting).spawn()
    other = engine_of(tmp_path, meeting)
    other.spawn()
    wait_until(lambda: other.pid is not None)
    assert other.exit_code() is None


def test_the_servers_end_when_the_job_fails(tmp_path: Path, meeting: Rendezvous, agent: threading.Thread) -> None:
    engine = engine_of(tmp_path, meeting)
    engine.spawn()
    wait_until(lambda: is_running(engine.pid) and "serving" in engine.log_tail())
    pid = engine.pid
    meeting.fail(Failure(node=0, host="n0", component="trainer", reason="it ended"))
    agent.join(20)
    assert not agent.is_alive() and not is_running(pid)


def test_an_engine_of_a_silent_node_counts_as_dead(
    tmp_path: Path, meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.rollout.remote.SILENT_SECONDS", 0.5)
    engine = engine_of(tmp_path, meeting)
    engine.spawn()
    assert engine.exit_code() is None
    wait_until(lambda: engine.exit_code() == LOST, 5.0)
    assert engine.log_tail() == "node 1 gives no sign of life any more"


def recipe() -> Recipe:
    return Recipe(name="r", run_dir="r", model=ModelConfig(path="m"), stages=(RlStage(name="a", domains=(), steps=1),))


def test_fleet_judges_and_teachers_go_where_the_placement_says(
    meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RENDEZVOUS_VARIABLE, str(meeting.folder))
    assert fleet_seats(recipe()).places == PLACES[:2]
    assert judge_seats(recipe(), "small").places == PLACES[2:3]
    assert [teacher_seats(recipe(), FleetConfig(), number).places for number in (0, 1)] == [PLACES[3:4], PLACES[4:]]


def test_a_fleet_of_another_size_than_its_places_is_refused(
    tmp_path: Path, meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RENDEZVOUS_VARIABLE, str(meeting.folder))
    with pytest.raises(FleetError, match="3 servers are wanted, but the job's placement has 2"):
        Fleet(FleetConfig(engines=3), "model", tmp_path, seats=fleet_seats(recipe()))
