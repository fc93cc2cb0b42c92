"""Answers on their way to rewards: groups that a judge compares, and a run that is stopped meanwhile."""

import dataclasses
import os
import signal
import threading
import time

import pytest
from judge_server import Said, judge_server, shown, verdict

from millrace.config.schema import DomainConfig, JudgeConfig, RlhfStage, RlStage
from millrace.environments.judge import HttpEndpoint, Judge, JudgeError
from millrace.environments.registry import make_environment
from millrace.observe.metrics import METRICS
from millrace.rollout.types import Rollout
from millrace.stages.collect import rollout_metrics
from millrace.stages.control import Stopped
from millrace.stages.rlhf import comparison

STAGE = RlhfStage(name="rlhf", domains=("chat",), steps=1, think_length_weight=0.0, answer_length_weight=0.0)


@pytest.fixture
def open_player(player_of, tokenizer, rows_file):
    """A function from a judge's URL to a player of the domain chat, which it judges."""
    train = rows_file([{"prompt": "say a"}, {"prompt": "say b"}], "train")
    held_out = rows_file([{"prompt": "say c", "reference": "c"}], "held_out")
    config = DomainConfig(environment="genrm", train=train, held_out=held_out, judge="j")

    def open_player(url, **settings):
        judge = Judge("j", JudgeConfig(url=url, retries=0, **settings), HttpEndpoint(url, None))
        player, domains = player_of(None, chat=(config, make_environment(config, {"j": judge})))
        return player, domains["chat"], tokenizer

    return open_player


def rollouts(tokenizer, answers, cut=()):
    return [
        Rollout(
            request_id="r",
            index=index,
            prompt=(1,),
            answer=tuple(tokenizer.encode(answer)),
            rollout_logp=(0.0,) * len(answer),
            finish_reason="length" if index in cut else "stop",
            weight_version=0,
            engine="e",
        )
        for index, answer in enumerate(answers)
    ]


def longer_is_better(request):
    first, second = shown(request)
    return Said(verdict(5, 1, 1) if len(first) > len(second) else verdict(1, 5, 6))


def test_an_rlhf_stage_compares_the_answers_of_each_group(open_player):
    with judge_server(longer_is_better) as server:
        player, domain, tokenizer = open_player(server.url)
        episodes = [domain.episode(domain.train, row, seed=0) for row in (0, 1)]
        groups = player.score(
            episodes,
            [rollouts(tokenizer, ["a", "aaa", "aa"]), rollouts(tokenizer, ["bb", "b", "bbbb"], cut=[2])],
            "rlhf 1/1",
            comparison(STAGE),
        )
    assert [group.episode for group in groups] == episodes
    assert groups[0].rewards == [1.0, 5.0, 3.0]
    assert groups[1].rewards == [5.0, 1.0, -1.5]  # an answer that was cut is not shown, and loses
    assert groups[1].answers[2].text == "bbbb"


def test_held_out_answers_are_judged_alone_against_their_reference(open_player):
    with judge_server(longer_is_better) as server:
        player, domain, tokenizer = open_player(server.url)
        episode = domain.episode(domain.held_out, 0, seed=0)
        (group,) = player.score([episode], [rollouts(tokenizer, ["ccc", "", "cccc"], cut=[2])], "held-out chat")
    assert group.rewards == [1.0, 0.0, 0.0]


def test_what_the_judge_did_is_among_the_metrics_of_a_step(open_player):
    texts = iter([verdict(4, 2, 2), "hm"] * 3)
    with judge_server(lambda request: Said(next(texts))) as server:
        player, domain, tokenizer = open_player(server.url)
        groups = player.score(
            [domain.episode(domain.train, 0, seed=0)],
            [rollouts(tokenizer, ["a", "aaa", "aa", "cut"], cut=[3])],
            "rlhf 1/1",
            comparison(STAGE),
        )
    metrics = rollout_metrics(groups)
    assert (metrics["judge/verdicts"], metrics["judge/unparsable"], metrics["judge/failed"]) == (6.0, 0.5, 0.0)
    assert metrics["judge/first_wins"] == 0.5 and metrics["judge/score"] == pytest.approx(3.0)
    assert 0 < metrics["judge/seconds"] < 5
    assert {name for name in metrics if name.startswith("judge/")} <= METRICS.keys()


def test_undecided_verdicts_are_said_aloud(open_player, tmp_path):
    texts = iter(["hm", verdict(4, 2, 2), "hm", "hm"])
    with judge_server(lambda request: Said(next(texts))) as server:
        player, domain, tokenizer = open_player(server.url)
        player.score([domain.episode(domain.held_out, 0, seed=0)], [rollouts(tokenizer, ["c", "cc"])], "held-out chat")
    said = (tmp_path / "logs" / "run.log").read_text()
    assert "held-out chat: 75.0% of the judge's verdicts stand undecided (0.0% unanswered, 75.0% unparsable)" in said


@pytest.mark.parametrize(
    ("split", "how"),
    [("train", comparison(STAGE)), ("held_out", None)],
)
def test_a_step_or_evaluation_without_one_verdict_is_refused(open_player, split, how):
    with judge_server(lambda request: Said("hm")) as server:
        player, domain, tokenizer = open_player(server.url)
        episode = domain.episode(getattr(domain, split), 0, seed=0)
        with pytest.raises(JudgeError, match=r"rlhf 3: the judge of chat decided not one verdict .*100% unparsable"):
            player.score([episode], [rollouts(tokenizer, ["a", "aa"])], "rlhf 3", how)


def test_one_verdict_that_cannot_be_had_ends_nothing(open_player):
    with judge_server(lambda request: Said("hm")) as server:
        player, domain, tokenizer = open_player(server.url)
        once = comparison(dataclasses.replace(STAGE, both_orders=False))
        episode = domain.episode(domain.train, 0, seed=0)
        (group,) = player.score([episode], [rollouts(tokenizer, ["a", "aa"])], "rlhf 1/1", once)
    assert all(answer.reward.details["unparsable"] == 1.0 for answer in group.answers)


def test_a_stop_leaves_a_judge_that_hangs(open_player, control):
    with judge_server(lambda request: Said("", delay=2.0)) as server:
        player, domain, tokenizer = open_player(server.url, concurrency=2)
        episodes = [domain.episode(domain.train, 0, seed=0)]
        answers = [rollouts(tokenizer, ["a", "aa", "aaa"])]
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with pytest.raises(Stopped):
            control.on_main_until_stopped(lambda: player.score(episodes, answers, "rlhf 1/1", comparison(STAGE)))
        assert time.monotonic() - began < 1.8
    assert len(server.requests) <= 2


def test_the_first_error_ends_the_scoring_of_all_groups(open_player):
    with judge_server(lambda request: Said(status=401, raw="no")) as server:
        player, domain, tokenizer = open_player(server.url)
        episodes = [domain.episode(domain.train, row, seed=0) for row in (0, 1)]
        answers = [rollouts(tokenizer, ["a", "aa"]), rollouts(tokenizer, ["b", "bb"])]
        with pytest.raises(JudgeError, match="refuses access"):
            player.score(episodes, answers, "rlhf 1/1", comparison(STAGE))


def test_a_stage_of_rewards_compares_nothing():
    assert comparison(RlStage(name="rl", domains=("math",), steps=1)) is None
