"""Domains as the player plays them: the workplace assistant over many turns, answers that a judge scores alone."""

import concurrent.futures
import json
from types import SimpleNamespace

import pytest
from judge_server import Said, judge_server
from tiny_checkpoints import IM_END, VOCABULARY, write_tokenizer

from millrace.config.schema import DomainConfig, JudgeConfig, SamplingConfig
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.judge import HttpEndpoint, Judge, JudgeError
from millrace.environments.registry import make_environment
from millrace.environments.workplace.generate import generated_office
from millrace.environments.workplace.tasks import distinct_tasks
from millrace.observe.console import RunConsole
from millrace.observe.metrics import METRICS
from millrace.rollout.types import Rollout
from millrace.stages.collect import rollout_metrics
from millrace.stages.domains import Domain
from millrace.stages.episodes import EpisodePlayer, Play


class ScriptedFleet:
    """Engines whose answers `answer(prompt text, number of the answer)` writes."""

    config = SimpleNamespace(max_model_len=30000)

    def __init__(self, answer):
        self._answer, self._pool = answer, concurrent.futures.ThreadPoolExecutor(4)

    def _rollout(self, request, index):
        prompt = bytes(token for token in request.prompt if token < 256).decode()
        answer = (*self._answer(prompt, index).encode(), IM_END)
        return Rollout(request.id, index, request.prompt, answer, (-0.5,) * len(answer), "stop", 3, "http://engine")

    def submit(self, requests):
        answers = [[self._rollout(request, k) for k in range(request.sampling.n)] for request in requests]
        return self._pool.submit(lambda: answers), lambda: (0, 0, 0)

    def submit_turn(self, request):
        return self._pool.submit(self._rollout, request, int(request.id.split("/")[-2]))


@pytest.fixture
def open_player(tmp_path, control):
    """A function from a domain's environment, rows, judge and fleet to a play of all rows, two answers each."""
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    tokenizer, console, players = ChatTokenizer(tmp_path, VOCABULARY), RunConsole(tmp_path), []

    def open_player(environment, rows, fleet, url=None):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DomainConfig(environment=environment, train=str(file), held_out=str(file), judge=url and "j")
        judge = Judge("j", JudgeConfig(url=url, retries=0), HttpEndpoint(url, None)) if url else None
        domain = Domain("d", config, make_environment(config, {"j": judge} if judge else None), tokenizer)
        players.append(EpisodePlayer(control, None, tokenizer, fleet, {"d": domain}, console))
        episodes = [domain.episode(domain.train, n, seed=10 * n) for n in range(len(rows))]
        return players[-1], Play(episodes, SamplingConfig(max_response_tokens=5000), 2, "rl 1/2 rollouts")

    yield open_player
    for player in players:
        player.close()
    console.close()


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

    player, play = open_player("workplace_assistant", [task.row("needed") for task in tasks], ScriptedFleet(answer))
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
        player, play = open_player("long_context", ROWS, ScriptedFleet(lambda prompt, index: f"{index}"), server.url)
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
        player, play = open_player("long_context", ROWS, ScriptedFleet(lambda prompt, index: "a"), server.url)
        with pytest.raises(JudgeError, match="the judge of d decided not one verdict"):
            player.play(play)
