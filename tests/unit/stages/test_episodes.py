import json

import pytest
from tiny_checkpoints import VOCABULARY, write_tokenizer

from millrace.config.schema import DomainConfig
from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.registry import make_environment
from millrace.stages.episodes import Domain


@pytest.fixture
def domain(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    rows = [
        {"prompt": text, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for text in ("ab", "abcd")
    ]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DomainConfig(
        environment="instruction_following",
        train=str(tmp_path / "train.jsonl"),
        held_out=str(tmp_path / "held_out.jsonl"),
        system_prompt="be brief",
    )
    return Domain("if", config, make_environment(config), ChatTokenizer(tmp_path, VOCABULARY))


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
