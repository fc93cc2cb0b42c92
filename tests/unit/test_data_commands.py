"""`millrace data`: what its generators write is what environments read."""

import json
from pathlib import Path

from chat_checkpoints import checkpoint
from typer.testing import CliRunner

from millrace.cli import app
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.workplace_assistant import WorkplaceEnvironment


def run(*arguments: str) -> None:
    done = CliRunner().invoke(app, ["data", *arguments])
    assert done.exit_code == 0, done.output


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_tasks_for_the_workplace_assistant_are_written(tmp_path: Path) -> None:
    asked = ("--train", "20", "--held-out", "5", "--most-calls", "2", "--offer", "needed")
    run("tools", str(tmp_path / "a"), *asked)
    run("tools", str(tmp_path / "b"), *asked)
    train, held_out = rows(tmp_path / "a" / "train.jsonl"), rows(tmp_path / "a" / "held_out.jsonl")
    assert (len(train), len(held_out)) == (20, 5)
    assert not {json.dumps(row["prompt"]) for row in train} & {json.dumps(row["prompt"]) for row in held_out}
    assert all(WorkplaceEnvironment(None).validate(row) is None for row in train + held_out)
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()


def test_questions_over_documents_have_the_length_asked_for(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "tokenizer", vocab_size=400)
    run(
        "long-context", str(tmp_path), "--tokenizer", str(folder), "--train", "3", "--held-out", "2", "--tokens", "5000"
    )
    encode = ChatTokenizer(folder).encode
    for row in rows(tmp_path / "train.jsonl") + rows(tmp_path / "held_out.jsonl"):
        assert 4400 < len(encode(row["prompt"])) == row["tokens"] <= 5000
        assert len(row["needed_documents"]) == 5
