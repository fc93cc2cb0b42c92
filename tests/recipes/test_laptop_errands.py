import asyncio
import json
import random
from itertools import groupby
from pathlib import Path

import pytest

from millrace.config.loading import load_recipe
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Reward
from millrace.environments.workplace_assistant import WorkplaceEnvironment

RECIPE = Path(__file__).parents[2] / "recipes" / "laptop" / "tools.yaml"
CONVERSATIONS = 300


@pytest.fixture(scope="module")
def errands(scripts):
    return scripts("tasks.errands")


@pytest.fixture(scope="module")
def drawn(errands):
    return errands.distinct_errands(1)


@pytest.fixture(scope="module")
def demo(scripts, tmp_path_factory):
    """A folder with the data and the base, of fewer demonstrations than in the recipe."""
    folder, make_data = tmp_path_factory.mktemp("demo"), scripts("make_data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_data, "TOOL_CONVERSATIONS", CONVERSATIONS)
        rows = make_data.write_tool_data(folder / "tools", 1)
    base = scripts("base_model")
    base.write_base(folder / "base-tools", base.train_tool_tokenizer(rows), 1, "dense")
    return folder


@pytest.fixture(scope="module")
def tokenizer(demo):
    return ChatTokenizer(demo / "base-tools")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained_turns(tokenizer, conversation):
    """What the policy writes in a conversation, turn by turn, decoded from the tokens that are trained on."""
    (sequence,) = tokenizer.render_conversation(conversation["messages"], tools=conversation["tools"])
    spans = groupby(zip(sequence.tokens, sequence.loss_mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in span]) for trained, span in spans if trained]


async def replay(environment, row, turns):
    """The reward of an episode, and what the environment says in it."""
    session, said = await environment.open(row), []
    for turn in turns:
        answer = await session.step(turn)
        if isinstance(answer, Reward):
            return answer.value, said
        said += [message["content"] for message in answer.messages]
    raise AssertionError("the episode has no end")


def test_right_demonstrations_are_rewarded_and_each_mistake_is_not(errands, drawn, tokenizer):
    environment = WorkplaceEnvironment(None)

    async def misjudged(errand):
        row = errand.row()
        for plan in (errand.right(), *errand.mistakes()):
            conversation = await errands.play(environment, row, plan)
            recorded = [message["content"] for message in conversation["messages"] if message["role"] == "tool"]
            value, said = await replay(environment, row, trained_turns(tokenizer, conversation))
            if said != recorded or value != float(plan == errand.right()):
                yield plan, value

    async def all_misjudged():
        return [wrong for errand in drawn[:80] async for wrong in misjudged(errand)]

    assert asyncio.run(all_misjudged()) == []


def test_mistakes_are_of_every_kind(drawn):
    """No search, no change, another tool, another argument."""
    kinds = set()
    for errand in drawn[:80]:
        right = errand.right()
        for plan in errand.mistakes():
            called = tuple(name for name, _ in plan)
            if called == tuple(name for name, _ in right):
                kinds.add("argument")
            elif len(plan) == 2:
                kinds.add("tool")
            else:
                kinds.add("no change" if plan[0] == right[0] else "no search")
    assert kinds == {"argument", "tool", "no change", "no search"}


def test_three_in_five_demonstrations_are_right(drawn):
    rng = random.Random(1)
    share = sum(errand.demonstrate(rng) == errand.right() for errand in drawn) / len(drawn)
    assert 0.55 < share < 0.65


def test_errands_are_valid_distinct_and_held_out(demo):
    environment = WorkplaceEnvironment(None)
    train, held_out = read(demo / "tools" / "train.jsonl"), read(demo / "tools" / "held_out.jsonl")
    assert [problem for row in train + held_out if (problem := environment.validate(row))] == []
    assert len({row["prompt"] for row in train + held_out}) == len(train) + len(held_out)
    assert len(train) > 1200 and len(held_out) == 128
    assert len({row["ground_truth"][0]["name"] for row in held_out}) == 4
    shown = {row["messages"][0]["content"] for row in read(demo / "tools" / "sft.jsonl")}
    assert not shown & {row["prompt"] for row in held_out}


def test_the_same_seed_draws_the_same_errands(demo, drawn):
    rows = [row for name in ("held_out", "train") for row in read(demo / "tools" / f"{name}.jsonl")]
    assert [{**row, "id": ""} for row in rows] == [{**errand.row(), "id": ""} for errand in drawn]


def test_conversations_fit_the_recipe_and_are_opened_as_in_training(demo, tokenizer):
    recipe = load_recipe(RECIPE)
    sft, rl = recipe.stages
    conversations = read(demo / "tools" / "sft.jsonl")
    assert len(conversations) == CONVERSATIONS
    for row in conversations:
        (sequence,) = tokenizer.render_conversation(row["messages"], tools=row["tools"])
        assert len(sequence.tokens) <= sft.max_length <= recipe.fleet.max_model_len
        assert sum(sequence.loss_mask) <= rl.sampling.max_response_tokens
        opening = row["messages"][:1]
        prompt = tokenizer.render_prompt(opening, tools=row["tools"])
        assert len(prompt) <= 80 and sequence.tokens[: len(prompt)] == prompt
        assert sum(message["role"] == "assistant" for message in row["messages"]) <= 3
    tokenizer.require_observations(opening, tools=row["tools"], thinking=None)
