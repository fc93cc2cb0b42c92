"""Judges that are real vLLM servers: one that has learnt a verdict by heart, and one of random weights."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from real_runs import SFT, output, run, write_recipe, write_rows, write_world
from tiny_checkpoints import VOCABULARY, write_checkpoint
from tiny_judge import write_judge

from millrace.cascade.judges import Judges, start_judges
from millrace.cascade.ledger import Ledger
from millrace.config.schema import DomainConfig, FleetConfig, JudgeConfig, ModelConfig, Recipe, RlhfStage
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Reward
from millrace.environments.registry import make_environment
from millrace.observe.writer import read_metrics
from millrace.rollout.chat import chat
from millrace.rollout.fleet_health import State
from millrace.stages.rlhf import comparison

ENGINE = dict(dtype="float32", max_model_len=512, max_num_seqs=16, kv_cache_bytes=64 << 20, heartbeat_s=0.5)
SAMPLING = dict(served_name="genrm", temperature=0.0, max_tokens=64)
CHAT = [{"role": "user", "content": "say abc"}]
STAGE = RlhfStage(name="rlhf", domains=("learnt",), steps=1, think_length_weight=0.0, answer_length_weight=0.0)


@dataclass
class Stand:
    recipe: Recipe
    judges: Judges
    run_dir: Path

    def score(self, domain: str, answers: list[str]) -> list[Reward]:
        environment = make_environment(self.recipe.domains[domain], self.judges.by_name)

        async def session() -> list[Reward]:
            return await environment.score_group({"prompt": "x"}, CHAT, answers, comparison(STAGE))

        return asyncio.run(session())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judges")
    write_judge(root / "learnt")
    write_checkpoint("qwen3", root / "random", seed=3)
    return root


@pytest.fixture(scope="module")
def stand(folder: Path) -> Iterator[Stand]:
    names = ("learnt", "random")
    recipe = Recipe(
        name="judged",
        run_dir=str(folder / "run"),
        model=ModelConfig(path=str(folder / "random")),
        domains={
            name: DomainConfig(environment="genrm", train="t.jsonl", held_out="h.jsonl", judge=name) for name in names
        },
        judges={
            name: JudgeConfig(model=str(folder / name), engine=FleetConfig(**ENGINE), retries=1, **SAMPLING)
            for name in names
        },
        stages=(STAGE,),
    )
    judges = start_judges(recipe, folder / "run")
    try:
        judges.wait_ready()
        yield Stand(recipe, judges, folder / "run")
    finally:
        judges.close()


@pytest.mark.slow
def test_the_roles_form_goes_through_a_real_server_to_a_verdict(stand: Stand) -> None:
    rewards = stand.score("learnt", ["abc", "the abc, or more of it", "no"])
    # Every verdict says 4 to 2 for the answer shown first, and each pair is shown in both orders: all are equally good,
    # and the shortest one gets the bonus.
    assert [reward.value for reward in rewards] == [3.0, 3.0, 3.5]
    assert all(reward.details["verdicts"] == 4.0 for reward in rewards)
    assert all(reward.details[name] == 0.0 for reward in rewards for name in ("failed", "unparsable"))
    assert all(reward.details["first_wins"] == 4.0 for reward in rewards)


@pytest.mark.slow
def test_the_judge_reads_the_very_tokens_of_its_chat_template(stand: Stand, folder: Path) -> None:
    fleet = stand.judges.fleets["learnt"]
    messages = [*CHAT, {"role": "response_1", "content": "abc"}, {"role": "response_2", "content": "d"}]
    body = {"model": "genrm", "messages": messages, "temperature": 0.0, "max_tokens": 64}
    reply = asyncio.run(chat(fleet, body, 60.0))
    assert reply["usage"]["prompt_tokens"] == len(ChatTokenizer(folder / "learnt", VOCABULARY).render_prompt(messages))
    assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.slow
def test_unparsable_verdicts_of_a_random_judge_are_counted(stand: Stand) -> None:
    rewards = stand.score("random", ["abc", "de"])
    assert [reward.details["unparsable"] for reward in rewards] == [2.0, 2.0]
    assert [reward.details["r_base"] for reward in rewards] == [3.0, 3.0]


@pytest.mark.slow
def test_an_answer_that_is_too_long_for_the_judge_is_a_failed_verdict(stand: Stand) -> None:
    rewards = stand.score("learnt", ["a" * 600, "b"])
    assert [reward.details["failed"] for reward in rewards] == [2.0, 2.0]


@pytest.mark.slow
def test_a_judge_is_behind_the_token_of_its_run_and_has_a_log_of_its_own(stand: Stand) -> None:
    (member,) = stand.judges.fleets["learnt"].members
    assert httpx.post(f"{member.client.url}/v1/chat/completions", json={}).status_code == 401
    assert sorted(path.name for path in (stand.run_dir / "logs").iterdir()) == [
        "judge-learnt-0.log",
        "judge-random-0.log",
    ]


@pytest.mark.slow
def test_a_judge_that_dies_is_started_again_and_gives_its_verdict(stand: Stand) -> None:
    (member,) = stand.judges.fleets["learnt"].members
    os.killpg(member.engine.pid, signal.SIGKILL)
    rewards = stand.score("learnt", ["abc", "de"])
    assert rewards[0].details["failed"] == rewards[0].details["unparsable"] == 0.0
    assert member.health.state is State.SERVING and member.health.restarts == 1


@pytest.mark.slow
def test_an_rlhf_stage_trains_on_the_verdicts_of_its_judge(folder: Path, tmp_path: Path) -> None:
    world = write_world(tmp_path)
    write_rows(world / "chat.jsonl", [{"prompt": f"say {word}"} for word in ("red", "green", "blue", "one")])
    write_rows(world / "asked.jsonl", [{"prompt": f"say {word}!", "reference": word} for word in ("red", "two")])
    engine: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "kv_cache_bytes": 67108864}
    recipe = write_recipe(
        world,
        "rlhf",
        stages=[
            {**SFT, "steps": 60, "optimizer": {"lr": 3.0e-3}},  # so that answers end before they are cut
            {
                "type": "rlhf",
                "name": "rlhf",
                "domains": ["chat"],
                "steps": 2,
                "prompts_per_step": 2,
                "samples_per_prompt": 4,
                "sampling": {"max_response_tokens": 48},
                "optimizer": {"lr": 1.0e-3},
            },
        ],
        domains=False,
    )
    with recipe.open("a", encoding="utf-8") as file:
        file.write(
            f"fleet: {engine}\n"
            "evaluation: {sampling: {max_response_tokens: 48}}\n"
            "domains: {chat: {environment: genrm, train: chat.jsonl, held_out: asked.jsonl, judge: tiny}}\n"
            f"judges: {{tiny: {{model: {folder / 'learnt'}, max_tokens: 64, temperature: 0.0, engine: {engine}}}}}\n"
        )
    assert run(recipe) == 0, output(recipe)
    run_dir = world / "runs" / "rlhf"
    steps = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["stage"] == "rlhf"]
    assert len(steps) == 2
    assert {"kl", "judge/verdicts", "judge/failed", "judge/unparsable", "judge/score"} <= steps[0].keys()
    assert steps[0]["judge/verdicts"] > 0 and steps[0]["judge/unparsable"] < 1.0
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6) and steps[1]["kl"] > 0.0
    scores = Ledger(run_dir).scores()
    assert list(scores) == ["start", "sft", "rlhf"]
    rates = [row["chat"]["pass_rate"] for row in scores.values()]
    assert all(0.0 <= rate <= 1.0 for rate in rates) and rates[-1] > 0.0
