import json
import socket

import pytest
from judge_server import Said, judge_server, verdict

from millrace.cascade.judges import start_judges, stop_token_ids
from millrace.config.errors import ConfigError
from millrace.config.schema import (
    DomainConfig,
    FleetConfig,
    JudgeConfig,
    ModelConfig,
    Recipe,
    RlhfStage,
)
from millrace.environments.judge import JudgeError

NOBODY = "http://127.0.0.1:9/v1"


def recipe(judges, **more):
    domains = {name: DomainConfig(environment="genrm", train="t", held_out="h", judge=name) for name in judges}
    stages = (RlhfStage(name="rlhf", domains=tuple(domains), steps=1),)
    return Recipe(
        name="r", run_dir="r", model=ModelConfig(path="m"), domains=domains, judges=judges, stages=stages, **more
    )


def test_a_judge_that_runs_elsewhere_is_waited_for_and_then_asked(tmp_path):
    with judge_server(lambda request: Said(verdict(4, 2, 2))) as server:
        judges = start_judges(recipe({"far": JudgeConfig(url=server.url)}), tmp_path)
        judges.wait_ready()
        assert list(judges.by_name) == ["far"]
        judges.close()


def test_a_judge_is_waited_for_past_the_proxies_of_the_environment(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with judge_server(lambda request: Said(verdict(4, 2, 2))) as server:
        judges = start_judges(
            recipe({"far": JudgeConfig(url=server.url, engine=FleetConfig(start_timeout_s=0.1))}), tmp_path
        )
        judges.wait_ready()


def test_a_judge_that_does_not_answer_at_the_start_is_named_with_its_key(tmp_path):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        config = JudgeConfig(url=url, engine=FleetConfig(start_timeout_s=0.1))
        judges = start_judges(recipe({"far": config}), tmp_path)
        with pytest.raises(JudgeError, match=rf"waited 0.1 s for judge far, but {url} .* correct judges\.far\.url"):
            judges.wait_ready()


def test_a_missing_api_key_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable JUDGE_KEY, which is not set"):
        start_judges(recipe({"far": JudgeConfig(url=NOBODY, api_key_variable="JUDGE_KEY")}), tmp_path)


def test_only_rank_zero_has_judges(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    judges = start_judges(recipe({"far": JudgeConfig(url=NOBODY)}), tmp_path)
    assert not judges.by_name
    judges.wait_ready()


@pytest.mark.parametrize(("said", "ids"), [({"eos_token_id": 7}, [7]), ({"eos_token_id": [7, 9]}, [7, 9]), ({}, [])])
def test_a_judge_stops_where_its_generation_config_says(tmp_path, said, ids):
    assert stop_token_ids(tmp_path) == []
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert stop_token_ids(tmp_path) == ids
