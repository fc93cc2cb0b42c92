"""The data of the laptop recipes that only try a stage out: what their scripts write is what the recipes read."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import ROOT

from millrace.config.loading import load_recipe
from millrace.config.schema import DomainConfig
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.judge import HttpEndpoint, Judge
from millrace.environments.python_tool import NAME, TOOLS
from millrace.environments.registry import make_environment
from millrace.environments.tool_calls import parse_tool_calls

LAPTOP = ROOT / "recipes" / "laptop"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sums_are_worked_out_by_a_call_that_the_environment_reads(scripts, tmp_path: Path) -> None:
    make_data = scripts("make_data")
    held_out = [one.row() for one in make_data.all_sums()[:20]]
    make_data.write_jsonl(tmp_path / "math" / "held_out.jsonl", held_out)
    make_data.write_python_data(tmp_path, 1)
    rows = read(tmp_path / "python" / "sft.jsonl")
    assert not {row["messages"][0]["content"] for row in rows} & {row["prompt"] for row in held_out}
    base = scripts("base_model")
    texts = [message["content"] for row in rows for message in row["messages"]]
    base.write_base(tmp_path / "base", base.train_tokenizer(texts), 1, "dense")
    tokenizer, (sft, _) = ChatTokenizer(tmp_path / "base"), load_recipe(LAPTOP / "python-tool.yaml").stages
    for row in rows[:50]:
        question, _, printed, last = row["messages"]
        (sequence,) = tokenizer.render_conversation(row["messages"], tools=row["tools"])
        assert len(sequence.tokens) <= sft.max_length
        text = tokenizer.decode([t for t, on in zip(sequence.tokens, sequence.loss_mask, strict=True) if on])
        (call,) = parse_tool_calls(text, TOOLS)
        assert call.name == NAME and f"What is {call.arguments['code']}?" == question["content"]
        assert str(eval(call.arguments["code"])) == printed["content"]
        assert last["content"] == f"\\boxed{{{printed['content']}}}"


@pytest.fixture(scope="module")
def issues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swe") / "swe"
    script = [sys.executable, str(LAPTOP / "make_repositories.py"), str(folder)]
    subprocess.run(script, check=True, timeout=120)
    return folder


def test_issues_are_also_rows_without_execution_that_their_golden_patch_solves(issues: Path) -> None:
    config = load_recipe(LAPTOP / "swe-agentless.yaml")
    judge = Judge("repair", config.judges["repair"], HttpEndpoint("", None))
    domain = DomainConfig(environment="swe_agentless", train="", held_out="", judge="repair")
    environment = make_environment(domain, {"repair": judge})
    rows = [row for name in ("train", "held_out") for row in read(issues / "agentless" / f"{name}.jsonl")]
    assert [environment.validate(row) for row in rows] == [None] * 8
    for row in rows:
        assert row["golden_patch"] not in environment.reset(row)[0]["content"]
        reward = asyncio.run(environment.step(row, (), f"```diff\n{row['golden_patch']}```"))
        assert (reward.value, reward.reason) == (1.0, "as the golden patch")
