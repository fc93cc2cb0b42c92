"""Domains as the player plays them: the workplace assistant over many turns, answers that a judge scores alone."""

import json

import pytest
from judge_server import Said, judge_server

from millrace.config.schema import DomainConfig, JudgeConfig, SamplingConfig
from millrace.environments.judge import HttpEndpoint, Judge, JudgeError
from millrace.environments.registry import make_environment
from millrace.environments.workplace.generate import generated_office
from millrace.environments.workplace.tasks import distinct_tasks
from millrace.observe.metrics import METRICS
from millrace.stages.collect import rollout_metrics
from millrace.stages.episodes import Play

from .turn_worlds import AnsweringFleet


@pytest.fixture
def open_player(player_of, rows_file):
    """A function from a domain's environment, rows, answers and judge to a play of all rows, two answers each."""

    def open_player(environment, rows, answer, url=None):
        file = rows_file(rows)
        config = DomainConfig(environment=environment, train=file, held_out=file, judge=url and "j")
        judge = Judge("j", JudgeConfig(url=url, retries=0), HttpEndpoint(url, None)) if url else None
        made = make_environment(config, {"j": judge} if judge else None)
        player, domains = player_of(AnsweringFleet(answer), d=(config, made))
        episodes = [domains["d"].episode(domains["d"].train, n, seed=10 * n) for n in range(len(rows))]
        return player, Play(episodes, SamplingConfig(max_response_tokens=5000), 2, "rl 1/2 rollouts")

    return open_player


def test_tasks_at_the_office_are_solved_turn_by_turn(open_player):
    tasks = distinct_tasks(generated_office(), 5, 6, most_calls=3)
    calls = {task.request: task.calls for task in tasks}

    def answer(prompt, index):
        """One call a turn, the right ones; the second answer forgets the last."""
        request = next(request for request in calls if request in prompt)
        todo = calls[request][: len(calls[request]) - index]
        done = prompt.split(request)[1].count("<tool_call>")
        if done >= len(todo):
            return "Done."
        name, arguments = todo[done]
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"

    player, play = open_player("workplace_assistant", [task.row("needed") for task in tasks], answer)
    groups = player.play(play)
    assert [group.rewards for group in groups] == [[1.0, 0.0]] * 6
    assert [group.answers[0].rollout.turns for group in groups] == [len(task.calls) + 1 for task in tasks]
    assert all(group.answers[0].reward.reason == "the tables are as they should be" for group in groups)


ROWS = [{"prompt": f"Document 1: {n}.\n\nQuestion: Which?", "answer": str(n)} for n in range(3)]


def test_answers_that_a_judge_scores_alone_are_counted_and_masked_without_a_verdict(open_player):
    def says(request):
        """Of the third row it decides nothing."""
        asked = request["messages"][0]["content"]
        return Said("hm") if "Document 1: 2" in asked else Said("VERDICT: CORRECT")

    with judge_server(says) as server:
        player, play = open_player("long_context", ROWS, lambda prompt, index: f"{index}", server.url)
        groups = player.play(play)
    assert [group.rewards for group in groups] == [[1.0, 1.0], [1.0, 1.0], []]
    metrics = rollout_metrics(groups)
    assert (metrics["judge/verdicts"], metrics["judge/failed"]) == (6.0, 0.0)
    assert metrics["judge/unparsable"] == metrics["reward/masked"] == pytest.approx(1 / 3)
    assert metrics["reward/mean"] == 1.0
    judged = {name for name in metrics if name.startswith("judge/")}
    assert (
        judged == {"judge/verdicts", "judge/failed", "judge/unparsable", "judge/seconds"} and judged <= METRICS.keys()
    )


def test_a_batch_without_one_verdict_ends_the_run(open_player):
    with judge_server(lambda request: Said(status=500, raw="x")) as server:
        player, play = open_player("long_context", ROWS, lambda prompt, index: "a", server.url)
        with pytest.raises(JudgeError, match="the judge of d decided not one verdict"):
            player.play(play)
