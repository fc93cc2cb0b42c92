"""Nodes that meet in a folder: who lives, what failed first."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millrace.rollout.rendezvous import RENDEZVOUS_VARIABLE, Failure, NodeState, Pulse, Rendezvous


@pytest.fixture
def meeting(tmp_path: Path) -> Rendezvous:
    found = Rendezvous(tmp_path / "launch" / "7.0")
    found.open()
    return found


def failure(number: int) -> Failure:
    return Failure(
        node=number, host=f"n{number}", component="trainer", reason=f"rank {number} ended", last_lines="tail"
    )


def test_a_node_is_known_when_it_has_come(meeting: Rendezvous) -> None:
    assert meeting.node(1) is None
    state = NodeState(node=1, host="n1", address="10.0.0.1", port=0, beat=4)
    meeting.announce(state)
    assert meeting.node(1) == state


def test_the_first_failure_stays_whoever_comes_after(meeting: Rendezvous) -> None:
    assert not meeting.over
    assert meeting.fail(failure(1)) and not meeting.fail(failure(0))
    found = meeting.failure()
    assert found is not None and str(found) == "node 1 (n1), trainer: rank 1 ended\ntail"
    assert meeting.over and sorted(os.listdir(meeting.folder)) == ["failure.json", "servers"]


def test_one_of_many_that_fail_at_once_is_on_record(meeting: Rendezvous) -> None:
    program = """
import sys, time
from pathlib import Path
from millrace.rollout.rendezvous import Failure, Rendezvous
meeting = Rendezvous(Path(sys.argv[1]))
while time.time() < float(sys.argv[3]): pass
won = meeting.fail(Failure(node=int(sys.argv[2]), host="n", component="trainer", reason="x" * 10_000))
sys.exit(0 if won else 1)
"""
    at = str(time.time() + 3)
    command = [sys.executable, "-c", program, str(meeting.folder)]
    racers = [subprocess.Popen([*command, str(number), at]) for number in range(4)]
    winners = [number for number, racer in enumerate(racers) if racer.wait(60) == 0]
    found = meeting.failure()
    assert found is not None and winners == [found.node]


def test_the_token_is_for_the_owner_alone_and_new_for_each_start(tmp_path: Path) -> None:
    tokens = []
    for name in ("7.0", "7.1"):
        meeting = Rendezvous(tmp_path / name)
        meeting.open()
        meeting.make_token()
        tokens.append(meeting.token())
        assert stat.S_IMODE(meeting.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((meeting.folder / "token").stat().st_mode) == 0o600
    assert tokens[0] != tokens[1] and min(map(len, tokens)) > 30


def test_a_node_is_silent_since_its_beat_last_changed() -> None:
    pulse = Pulse()

    def state(beat: int) -> NodeState:
        return NodeState(node=2, host="n2", beat=beat)

    seen = [(5, 100.0), (5, 103.0), (6, 104.0), (6, 110.0)]
    assert [pulse.silent_for(state(beat), now) for beat, now in seen] == [0.0, 3.0, 0.0, 6.0]


def test_a_run_on_one_machine_has_no_rendezvous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RENDEZVOUS_VARIABLE, raising=False)
    assert Rendezvous.of_environment() is None
    monkeypatch.setenv(RENDEZVOUS_VARIABLE, str(tmp_path))
    found = Rendezvous.of_environment()
    assert found is not None and found.folder == tmp_path
