"""The player with episodes of one turn and of many: an engine lost on the way, a stop in the middle, the order."""

import asyncio
import dataclasses
import os
import signal
import threading
import time

import pytest

from millrace.config.schema import DomainConfig, SamplingConfig
from millrace.environments.base import Observation, Reward
from millrace.environments.registry import make_environment
from millrace.rollout.member import FleetNeedsSync
from millrace.stages.control import Stopped
from millrace.stages.episodes import Play
from millrace.stages.verdicts import TooManyMasked

from .turn_worlds import AnsweringFleet


class Countdown:
    """Answers so many turns as the row says, and then gives a reward."""

    required_fields = ("prompt", "turns")

    def __init__(self):
        self.opened, self.closed = [], []

    def validate(self, row):
        return None

    def reset(self, row):
        return [{"role": "user", "content": row["prompt"]}]

    def tools(self, row):
        return []

    async def open(self, row):
        self.opened.append(row["prompt"])
        return CountdownSession(self, row, row["turns"])

    async def close(self):
        pass


@dataclasses.dataclass
class CountdownSession:
    environment: Countdown
    row: dict
    left: int

    async def step(self, answer):
        self.left -= 1
        await asyncio.sleep(self.row.get("seconds", 0))
        if self.row.get("broken"):
            raise RuntimeError("no container")
        return Observation([{"role": "tool", "content": f"{self.left} left"}]) if self.left else Reward(1.0, "done")

    async def cut(self, by):
        return Reward(0.0, by)

    async def close(self):
        self.environment.closed.append(self.row["prompt"])


SAY_OK = {"prompt": "say ok", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
ROWS = [{"prompt": "a", "turns": 1}, {"prompt": "b", "turns": 3}, {"prompt": "c", "turns": 12}]


def fleet_of(**options):
    return AnsweringFleet(lambda prompt, index: "ok", **options)


@pytest.fixture
def open_player(player_of, rows_file):
    def open_player(rows, fleet):
        counted, said = rows_file(rows, "count"), rows_file([SAY_OK], "if")
        plain = DomainConfig(environment="instruction_following", train=said, held_out=said)
        config = dataclasses.replace(plain, environment="python_tool", train=counted, held_out=counted)
        environment = Countdown()
        player, domains = player_of(fleet, **{"count": (config, environment), "if": (plain, make_environment(plain))})
        episodes = [domains["count"].episode(domains["count"].train, n, seed=10 * n) for n in range(len(rows))]
        episodes.insert(1, domains["if"].episode(domains["if"].train, 0, seed=0))
        return player, environment, Play(episodes, SamplingConfig(max_response_tokens=100), 2, "rl 1/2 rollouts")

    return open_player


def turns_of(groups):
    return [[answer.rollout.turns for answer in group.answers] for group in groups]


def test_groups_come_in_the_order_of_their_episodes_whatever_their_turns(open_player):
    player, environment, play = open_player(ROWS, fleet_of())
    groups = player.play(play)
    assert [group.episode for group in groups] == list(play.episodes)
    assert turns_of(groups) == [[1, 1], [1, 1], [3, 3], [12, 12]]
    assert all(group.rewards == [1.0, 1.0] for group in groups)
    assert sorted(environment.closed) == sorted(environment.opened) == list("aabbcc")
    assert [a.rollout.index for a in groups[2].answers] == [0, 1]
    again = player.play_alone(play)
    assert [group.answers for group in again] == [group.answers for group in groups]


def test_when_all_engines_were_lost_open_episodes_start_again_and_ended_ones_do_not(open_player):
    fleet = fleet_of(lost_at=18)
    player, environment, play = open_player(ROWS, fleet)
    groups = player.play(play)
    assert fleet.syncs == 1
    assert turns_of(groups) == [[1, 1], [1, 1], [3, 3], [12, 12]]
    assert environment.opened.count("a") == environment.opened.count("b") == 2
    assert environment.opened.count("c") == 4
    assert [request.id for request in fleet.batched] == [play.episodes[1].request_id], "answers in one turn are kept"
    assert sorted(environment.closed) == sorted(environment.opened)
    last = play.episodes[3].request_id
    first, second = ([r.prompt for r in fleet.asked if r.id.startswith(f"{last}/{k}/")] for k in (0, 1))
    assert len(first) > 12 and set(first) == set(second)
    with pytest.raises(FleetNeedsSync):
        fleet.lost_at = 0
        player.play_alone(play)


def test_a_stop_in_the_middle_closes_every_session(open_player):
    player, environment, play = open_player([{"prompt": "a", "turns": 2, "seconds": 60}], fleet_of())
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        player.play(play)
    assert time.monotonic() - began < 20
    assert environment.opened == environment.closed == ["a", "a"]


def test_episodes_run_beside_each_other_and_not_in_step(open_player):
    rows = [{"prompt": f"p{n}", "turns": 2, "seconds": 0.3} for n in range(30)]
    player, environment, play = open_player(rows, fleet_of())
    began = time.monotonic()
    assert len(player.play(play)) == 31
    assert time.monotonic() - began < 10, "one after the other they would take 36 s"
    assert len(environment.closed) == 60


def test_broken_environments_stop_the_run_only_when_they_are_most(open_player):
    good, bad = {"prompt": "a", "turns": 2}, {"prompt": "b", "turns": 2, "broken": True}
    player, _, play = open_player([good, bad], fleet_of())
    groups = player.play(play)
    assert [len(group.rewards) for group in groups] == [2, 2, 0]
    player, _, play = open_player([good, bad, bad], fleet_of())
    with pytest.raises(TooManyMasked, match=r"4 of 6 answers in count are masked, most often: .*RuntimeError"):
        player.play(play)
