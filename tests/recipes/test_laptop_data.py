import asyncio
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config.loading import load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.schema import DomainConfig
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.registry import make_environment

RECIPES = Path(__file__).parents[2] / "recipes" / "laptop"
DOMAINS = ("math", "instruction_following")


def load_script():
    spec = importlib.util.spec_from_file_location("laptop_make_data", RECIPES / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_data():
    return load_script().main


@pytest.fixture(scope="module")
def demo(make_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_data(["--out", str(folder), "--seed", "3", "--moe"])
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def environment(domain):
    return make_environment(DomainConfig(environment=domain, train="", held_out=""))


@pytest.mark.parametrize("domain", DOMAINS)
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


@pytest.mark.parametrize("domain", DOMAINS)
def test_demonstrations_show_no_held_out_prompt_and_pass_about_half_of_the_time(demo, domain):
    rows = {row["prompt"]: row for row in read(demo / domain / "train.jsonl")}
    held_out = {row["prompt"] for row in read(demo / domain / "held_out.jsonl")}
    conversations = [row["messages"] for row in read(demo / "sft.jsonl")]
    assert not [question for question, _ in conversations if question["content"] in held_out]
    pairs = [(rows[q["content"]], a["content"]) for q, a in conversations if q["content"] in rows][:600]
    env = environment(domain)

    async def score():
        try:
            return [await env.step(row, env.reset(row), answer) for row, answer in pairs]
        finally:
            await env.close()

    rewards = [reward.value for reward in asyncio.run(score())]
    assert 0.35 < sum(rewards) / len(rewards) < 0.75


@pytest.mark.parametrize("base", ["base", "base-moe"])
def test_the_base_and_its_tokenizer_load_and_fit_each_other(demo, base):
    shape = ModelShape.from_hf(demo / base)
    tokenizer = ChatTokenizer(demo / base, shape.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(demo / base, dtype=torch.float32)
    tokens, mask = tokenizer.render_conversation(read(demo / "sft.jsonl")[0]["messages"])
    logits = model(torch.tensor([tokens])).logits
    assert logits.shape == (1, len(tokens), shape.vocab_size) and torch.isfinite(logits).all()
    assert any(mask) and tokens[-1] == tokenizer.end_of_turn_id
    assert shape.num_kv_heads % 2 == 0 and shape.num_experts % 2 == 0


def test_any_text_survives_the_tokenizer(demo):
    tokenizer = ChatTokenizer(demo / "base", ModelShape.from_hf(demo / "base").vocab_size)
    for text in ("Größe: 1024 €\n\t<think>x</think>", "\\boxed{7}", '- A\n- "b"'):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompts_and_demonstrations_fit_the_recipes(demo):
    tokenizer = ChatTokenizer(demo / "base", ModelShape.from_hf(demo / "base").vocab_size)
    recipe = load_recipe(RECIPES / "dense.yaml")
    for row in read(demo / "sft.jsonl")[:1500]:
        tokens, mask = tokenizer.render_conversation(row["messages"])
        assert len(tokens) - sum(mask) <= 48
        assert sum(mask) <= recipe.evaluation.sampling.max_response_tokens


def test_the_same_seed_writes_the_same_files(demo, make_data, tmp_path):
    make_data(["--out", str(tmp_path / "again"), "--seed", "3"])
    make_data(["--out", str(tmp_path / "other"), "--seed", "4"])
    for name in ("sft.jsonl", "math/train.jsonl", "base/model.safetensors", "base/tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (demo / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (demo / name).read_bytes()
