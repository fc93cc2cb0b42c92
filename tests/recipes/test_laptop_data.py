import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config.loading import load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.schema import DomainConfig
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.judge import parse_judgement
from millrace.environments.judge_prompt import judge_messages
from millrace.environments.registry import make_environment

RECIPES = Path(__file__).parents[2] / "recipes" / "laptop"
SCORED = {"math": 600, "instruction_following": 600, "mcqa": 600, "code": 120}
"""Domains whose environments score an answer alone, and demonstrations that are scored here: programs are run."""


@pytest.fixture(scope="module")
def make_data(scripts):
    return scripts("make_data").main


@pytest.fixture(scope="module")
def demo(make_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_data(["--out", str(folder), "--seed", "3", "--moe", "--hybrid", "--code"])
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def environment(domain):
    return make_environment(DomainConfig(environment=domain, train="", held_out=""))


@pytest.mark.parametrize("domain", SCORED)
def test_training_and_held_out_prompts_are_valid_and_disjoint(demo, domain):
    train, held_out = read(demo / domain / "train.jsonl"), read(demo / domain / "held_out.jsonl")
    env = environment(domain)
    assert [problem for row in train + held_out if (problem := env.validate(row))] == []
    assert all(field in row for row in train + held_out for field in env.required_fields)
    assert len(train) >= 600 and len(held_out) >= 100
    assert len({row["id"] for row in train + held_out}) == len(train) + len(held_out)
    assert not {ingredients(row) for row in train} & {ingredients(row) for row in held_out}


def ingredients(row):
    """A prompt's sentences, whatever their order."""
    return frozenset(row["prompt"].rstrip(".?").split(". "))


def pass_rate(demo, domain, file):
    """Of the demonstrations that `file` shows of a domain's training prompts, by the domain's own environment."""
    rows = {row["prompt"]: row for row in read(demo / domain / "train.jsonl")}
    conversations = [row["messages"] for row in read(demo / file)]
    pairs = [(rows[q["content"]], a["content"]) for q, a in conversations if q["content"] in rows]
    env = environment(domain)

    async def score():
        try:
            return await asyncio.gather(
                *(env.step(row, env.reset(row), answer) for row, answer in pairs[: SCORED[domain]])
            )
        finally:
            await env.close()

    rewards = [reward.value for reward in asyncio.run(score())]
    return sum(rewards) / len(rewards)


@pytest.mark.parametrize(
    ("file", "domain", "least", "most"),
    [
        ("sft.jsonl", "math", 0.35, 0.75),
        ("sft.jsonl", "instruction_following", 0.35, 0.75),
        ("cascade/sft.jsonl", "math", 1.0, 1.0),
        ("cascade/sft.jsonl", "instruction_following", 0.35, 0.75),
        ("cascade/sft.jsonl", "mcqa", 0.35, 0.75),
        ("code/sft.jsonl", "code", 0.35, 0.65),
    ],
)
def test_demonstrations_pass_as_often_as_their_recipe_wants(demo, file, domain, least, most):
    assert least <= pass_rate(demo, domain, file) <= most


@pytest.mark.parametrize("file", ["sft.jsonl", "cascade/sft.jsonl", "judge/train.jsonl", "code/sft.jsonl"])
def test_conversations_show_no_held_out_prompt(demo, file):
    held_out = {row["prompt"] for path in demo.glob("*/held_out.jsonl") for row in read(path) if "prompt" in row}
    assert len(held_out) == 4 * 128 + 64
    assert not [row for row in read(demo / file) if row["messages"][0]["content"] in held_out]


def test_chat_prompts_are_disjoint_and_held_out_ones_have_a_reference_that_a_good_answer_beats(demo, scripts):
    quality = scripts("tasks.notes").quality
    train, held_out = read(demo / "chat" / "train.jsonl"), read(demo / "chat" / "held_out.jsonl")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    qualities = [quality(row["reference"]) for row in held_out]
    assert set(qualities) <= {1, 2, 3, 4, 5} and 3 < sum(qualities) / len(qualities) < 4.5


def test_quality_counts_the_parts_of_an_invitation(scripts):
    quality = scripts("tasks.notes").quality
    assert quality("Dear Ann. Please come to the park on Monday. Yours.") == 5
    assert quality("Please come to the park. Goodbye.") == 3
    assert quality("Come to the park.") == quality("") == 1


def test_verdicts_follow_the_rule_and_are_read_as_judgements(demo, scripts):
    quality = scripts("tasks.notes").quality
    rows = read(demo / "judge" / "held_out.jsonl")
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "response_1", "response_2", "assistant"]
    for row in rows:
        _, first, second, verdict = (message["content"] for message in row["messages"])
        judgement = parse_judgement(verdict)
        assert (judgement.score_1, judgement.score_2) == (quality(first), quality(second))
        assert (judgement.ranking <= 3) == (judgement.score_1 >= judgement.score_2)
    assert {parse_judgement(row["messages"][-1]["content"]).ranking for row in rows} == {1, 2, 3, 4, 5, 6}


def test_pairs_are_shown_to_the_judge_as_it_has_learnt_them(demo):
    messages = read(demo / "judge" / "held_out.jsonl")[0]["messages"]
    first, second = messages[1]["content"], messages[2]["content"]
    assert list(judge_messages("roles", messages[:1], first, second)) == messages[:-1]


@pytest.mark.parametrize("base", ["base", "base-moe", "base-hybrid", "base-code"])
def test_the_base_and_its_tokenizer_load_and_fit_each_other(demo, base):
    shape = ModelShape.from_hf(demo / base)
    tokenizer = ChatTokenizer(demo / base, shape.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(demo / base, dtype=torch.float32)
    (sequence,) = tokenizer.render_conversation(read(demo / "sft.jsonl")[0]["messages"])
    tokens, mask = sequence.tokens, sequence.loss_mask
    logits = model(torch.tensor([tokens])).logits
    assert logits.shape == (1, len(tokens), shape.vocab_size) and torch.isfinite(logits).all()
    assert any(mask) and tokens[-1] == tokenizer.end_of_turn_id
    assert shape.num_kv_heads % 2 == 0 and shape.num_experts % 2 == 0


def test_any_text_survives_the_tokenizer(demo):
    tokenizer = ChatTokenizer(demo / "base", ModelShape.from_hf(demo / "base").vocab_size)
    for text in ("Größe: 1024 €\n\t<think>x</think>", "\\boxed{7}", '- A\n- "b"'):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("name", "file", "base"),
    [("dense", "sft.jsonl", "base"), ("cascade", "cascade/sft.jsonl", "base"), ("code", "code/sft.jsonl", "base-code")],
)
def test_prompts_and_demonstrations_fit_the_recipes(demo, name, file, base):
    tokenizer = ChatTokenizer(demo / base, ModelShape.from_hf(demo / base).vocab_size)
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    for row in read(demo / file)[:1500]:
        (sequence,) = tokenizer.render_conversation(row["messages"])
        trained = sum(sequence.loss_mask)
        assert len(sequence.tokens) - trained <= 48
        assert trained <= recipe.evaluation.sampling.max_response_tokens


def test_the_same_seed_writes_the_same_files(demo, make_data, tmp_path):
    make_data(["--out", str(tmp_path / "again"), "--seed", "3"])
    make_data(["--out", str(tmp_path / "other"), "--seed", "4"])
    data = ("sft.jsonl", "cascade/sft.jsonl", "judge/train.jsonl", "math/train.jsonl", "chat/held_out.jsonl")
    for name in (*data, "base/model.safetensors", "base/tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (demo / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (demo / name).read_bytes()
