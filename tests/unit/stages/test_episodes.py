import asyncio
import dataclasses
import json

import pytest
from tiny_checkpoints import VOCABULARY, write_tokenizer

from millrace.config.schema import CurriculumConfig, DomainConfig
from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.registry import make_environment
from millrace.rollout.types import Rollout
from millrace.stages.collect import drawn_text
from millrace.stages.domains import Domain
from millrace.stages.episodes import EpisodePlayer


@pytest.fixture
def domain(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    rows = [
        {"prompt": text, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for text in ("ab", "abcd")
    ]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = domain_config(tmp_path)
    return Domain("if", config, make_environment(config), ChatTokenizer(tmp_path, VOCABULARY))


def domain_config(tmp_path):
    return DomainConfig(
        environment="instruction_following",
        train=str(tmp_path / "train.jsonl"),
        held_out=str(tmp_path / "held_out.jsonl"),
        system_prompt="be brief",
        pass_rates=str(tmp_path / "rates.jsonl"),
    )


def test_the_system_prompt_opens_every_episode(domain):
    episode = domain.episode(domain.train, 1, seed=7)
    assert [message["role"] for message in episode.messages] == ["system", "user"]
    assert episode.seed == 7 and episode.domain == "if"


def test_a_prompt_that_leaves_no_room_for_its_answer_is_named_before_the_run(domain):
    longest = len(domain.episode(domain.train, 1, seed=0).prompt)
    domain.require_room(domain.train, context=longest + 8, answer=8)
    with pytest.raises(
        DataError, match=rf"train\.jsonl:2: the prompt has {longest} tokens, .* lower max_response_tokens"
    ):
        domain.require_room(domain.train, context=longest + 7, answer=8)


def rate(domain, tmp_path, *rates):
    rows = [{"id": domain.train.row_id(index), "pass_rate": rate} for index, rate in enumerate(rates)]
    (tmp_path / "rates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_curriculum_chooses_among_the_training_rows_by_their_pass_rates(domain, tmp_path):
    rate(domain, tmp_path, 0.0, 0.5)
    assert domain.training_rows(CurriculumConfig()) == 2
    assert domain.training_rows(CurriculumConfig(above=0)).rows == (1,)
    assert domain.training_rows(CurriculumConfig(order="easy_to_hard")).rates == (0.0, 0.5)


def test_what_a_curriculum_draws_and_leaves_out_is_said(domain, tmp_path):
    rate(domain, tmp_path, 0.0, 0.5)
    assert drawn_text("if", domain.training_rows(CurriculumConfig(above=0, order="easy_to_hard"))) == (
        "if draws from 1 of 2 prompts, pass rates 0.50 down to 0.50; 1 too hard and 0 too easy ones are left out"
    )


def test_a_curriculum_that_leaves_nothing_is_refused_with_the_counts(domain, tmp_path):
    rate(domain, tmp_path, 0.0, 1.0)
    with pytest.raises(
        DataError, match=r"leaves none of 2 training prompts, .* 1 are not above 0 and 1 are not below 1; widen"
    ):
        domain.training_rows(CurriculumConfig(above=0, below=1))


def test_a_training_row_without_a_pass_rate_is_named(domain, tmp_path):
    rate(domain, tmp_path, 0.5)
    with pytest.raises(DataError, match=r"train\.jsonl:2: the row with the id \w+ has no pass rate"):
        domain.training_rows(CurriculumConfig(above=0))


def nemotron_domain(tmp_path, thinking, *rows):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    asked = {"prompt": "q", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**asked, **row}) + "\n" for row in rows))
    config = DomainConfig(
        environment="instruction_following",
        train=str(tmp_path / "train.jsonl"),
        held_out=str(tmp_path / "held_out.jsonl"),
        thinking=thinking,
    )
    tokenizer = ChatTokenizer(tmp_path, VOCABULARY, chat_template="nemotron")
    return Domain("if", config, make_environment(config), tokenizer), tokenizer


def test_the_domain_says_the_form_of_its_prompts_and_a_row_its_own(tmp_path):
    tools = [{"name": "now", "parameters": {}}]
    domain, tokenizer = nemotron_domain(tmp_path, False, {}, {"thinking": True}, {"tools": tools})
    for data in (domain.train, domain.held_out):
        plain, thinking, with_tools = (domain.episode(data, row, seed=0) for row in range(3))
        assert tokenizer.decode(plain.prompt, skip_special=False).endswith("assistant\n<think></think>")
        assert tokenizer.decode(thinking.prompt, skip_special=False).endswith("assistant\n<think>\n")
        assert (plain.opening, thinking.opening) == ("", "<think>\n")
        assert "<name>now</name>" in tokenizer.decode(with_tools.prompt)


def test_reasoning_that_was_cut_is_no_answer(tmp_path):
    domain, tokenizer = nemotron_domain(tmp_path, True, {})
    player = EpisodePlayer(None, lambda: None, tokenizer, None, {"if": domain}, None)
    episode = domain.episode(domain.train, 0, seed=0)

    def scored(text):
        rollout = Rollout("r", 0, episode.prompt, tuple(tokenizer.encode(text)), (), "length", 0, "http://engine")
        return asyncio.run(player._score_one(episode, rollout))

    try:
        assert scored("no comma here\n</think>\nnone here").reward.value == 1
        assert scored("one, two\n</think>\nnone here").reward.value == 1
        cut = scored("no comma here")
        assert cut.text == "<think>\nno comma here" and cut.reward.value == 0
    finally:
        player.close()


def test_a_row_of_a_wrong_form_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl:1: the field 'thinking' must be true or false, not 'no'"):
        nemotron_domain(tmp_path, None, {"thinking": "no"})


def test_a_form_that_the_template_does_not_have_is_named_with_its_row(domain, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text(json.dumps({**rows[0], "thinking": False}) + "\n")
    config = dataclasses.replace(domain_config(tmp_path), pass_rates=None)
    other = Domain("if", config, make_environment(config), ChatTokenizer(tmp_path, VOCABULARY))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the chat template of .* has no thinking and non-"):
        other.require_room(other.train, context=100, answer=8)
