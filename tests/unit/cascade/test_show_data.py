"""`millrace data show`: what it says of a recipe's data, right and wrong, and with which exit code."""

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from tiny_checkpoints import write_tokenizer
from typer.testing import CliRunner

from millrace.cascade.show_data import KEPT
from millrace.cli import app
from millrace.config.errors import ConfigError
from millrace.config.schema import DomainConfig

TALK = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
TOLD = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
RULE = "no commas, please"


def write(file: str, *rows: object) -> None:
    Path(file).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(cascade_file: Path) -> str:
    """A recipe of three domains, one of them compared by a judge, and of one SFT stage, all of whose data are right."""
    write_tokenizer(cascade_file.parent / "base")
    write("sft.jsonl", TALK, TALK)
    rows = [{"prompt": f"{RULE}: {n}", "answer": "nowhere", "reference": "r", **TOLD} for n in ("1", "12", "1234")]
    write("math.jsonl", *rows)
    write("held-out.jsonl", rows[0])
    return cascade_file.name


def show(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", "show", *arguments])
    if isinstance(done.exception, ConfigError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_right_data_are_shown_as_a_run_reads_them(recipe: str) -> None:
    code, told = show(recipe)
    assert code == 0, told
    assert [line for line in told.splitlines() if not line.startswith(" ")] == [
        "domain math: environment math",
        "domain format: environment instruction_following",
        "domain chat: environment genrm",
        "stage warm: conversations",
    ]
    # A prompt is ChatML around its text: the user's turn, and the beginning of the assistant's. A byte is a token.
    around = len("user\n") + len("\nassistant\n") + 3
    least, most = around + len(RULE) + 3, around + len(RULE) + 6
    assert f"train: 3 prompts of {least} to {most} tokens, median {least + 1}" in told
    assert f"held_out: 1 prompts of {least} to {least} tokens" in told
    assert "math.jsonl:1; kept from the policy: answer\n" in told
    assert "kept from the policy: instruction_id_list, kwargs\n" in told
    assert f"    | <|im_start|>user\n    | {RULE}: 1<|im_end|>\n    | <|im_start|>assistant\n" in told
    assert "nowhere" not in told, "an answer is no part of a prompt"
    assert "2 training sequences" in told and "2<|im_end|>" in told


def test_one_domain_and_few_rows_are_shown_alone(recipe: str) -> None:
    code, told = show(recipe, "--domain", "format", "--rows", "2")
    assert code == 0
    assert "math.jsonl, 3 rows" in told and "train: 2 prompts" in told
    assert "domain math" not in told and "stage warm" not in told
    with pytest.raises(ConfigError, match=r"domains\.formt is not in the recipe \(did you mean format\?\)"):
        show(recipe, "--domain", "formt")


def test_wrong_rows_are_told_with_their_lines_and_the_first_ones_only(recipe: str) -> None:
    good = {"prompt": "p", "answer": "2", "reference": "r", **TOLD}
    write("math.jsonl", good, "\n", "{\n", *[{**good, "answer": []}] * 7, {**good, "kwargs": None})
    code, told = show(recipe)
    assert code == 1
    math, format_, *_ = told.split("domain ")[1:]
    assert "math.jsonl, 10 rows, 8 of them wrong:" in math
    assert [line.split("math.jsonl:")[1].split(":")[0] for line in math.splitlines() if "math.jsonl:" in line] == [
        "3",
        *"4567",
    ]
    assert "and 3 more" in math and "    |" not in math
    assert "math.jsonl:3: not valid JSON" in format_ and "math.jsonl:11: kwargs must be a list" in format_
    assert "2 training sequences" in told, "the others are shown all the same"


def test_what_a_run_would_refuse_besides_is_wrong_too(recipe: str) -> None:
    good = {"prompt": "p", "answer": "2", "reference": "r", **TOLD}
    write("math.jsonl", good, {**good, "prompt": "p" * 200})
    code, told = show(recipe, "--domain", "math")
    assert code == 1 and "math.jsonl:2: the prompt has 2" in told and "fleet.max_model_len 256" in told
    write("math.jsonl", {**good, "id": 1}, {**good, "id": 1})
    code, told = show(recipe, "--domain", "math")
    assert code == 1 and "the id 1 is also that of" in told
    Path("math.jsonl").unlink()
    code, told = show(recipe, "--domain", "math")
    assert code == 1 and "domains.math.train" in told and "does not exist" in told


def test_conversations_that_cannot_be_trained_on_are_told(recipe: str) -> None:
    long = {"messages": [*TALK["messages"][:1], {"role": "assistant", "content": "2" * 200}]}
    write("sft.jsonl", TALK, long, {"messages": TALK["messages"][:1]})
    code, told = show(recipe)
    assert code == 1
    assert "sft.jsonl:2: " in told and "more than max_length 128" in told
    assert "sft.jsonl:3: the conversation has no assistant message to train on" in told
    write("sft.jsonl", TALK, long)
    code, told = show(recipe, "stages.warm.drop_overlong=true")
    assert code == 0 and "1 are longer than max_length 128 and dropped" in told


def test_a_long_prompt_is_cut_to_a_screen(recipe: str) -> None:
    lines = "\n".join(str(number) for number in range(60))
    write("math.jsonl", {"prompt": lines, "answer": "2"})
    write("held-out.jsonl", {"prompt": "p", "answer": "2"})
    code, told = show(recipe, "--domain", "math", "fleet.max_model_len=300")
    shown = [line for line in told.splitlines() if line.startswith("    |")]
    assert code == 0 and len(shown) == 25
    assert shown[16] == "    | [... 39 lines left out ...]"
    assert shown[-3:] == ["    | 59<|im_end|>", "    | <|im_start|>assistant", "    | "]


def test_it_is_known_of_every_environment_what_it_keeps() -> None:
    environments = set(get_args(get_type_hints(DomainConfig)["environment"]))
    assert environments == {*KEPT, "agent"}
