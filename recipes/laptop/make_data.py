"""Write what the laptop recipes start from: a small random base model with its own tokenizer, and synthetic data.

    python recipes/laptop/make_data.py --out demo --seed 1

Four tasks (`tasks/`), each scored by one of Millrace's own environments: math, instruction following, multiple choice
and, compared by a judge, chat. Training and held-out prompts are disjoint. Besides the prompts there are

* `sft.jsonl`: noisy demonstrations of math and instruction following, of which half pass, for dense.yaml, moe.yaml and
  nemotron_h.yaml;
* `cascade/sft.jsonl`: demonstrations of all four tasks for cascade.yaml, right in math and noisy elsewhere;
* `judge/train.jsonl`, `judge/held_out.jsonl`: pairs of chat answers with the verdict of a rule, for judge.yaml;
* with --code `code/`: programming problems, and demonstrations of which half pass, for code.yaml;
* with --tools `tools/`: errands at the office, and conversations with tool calls of which three in five do them, for
  tools.yaml;
* with --python `python/sft.jsonl`: sums of math worked out by calls of Python, for python-tool.yaml.

The base follows the Qwen3 layout (`base/`), with --moe also the mixture-of-experts one (`base-moe/`), and with --hybrid
also that of Nemotron-H, with Mamba-2 layers (`base-hybrid/`). --code adds `base-code/` and --tools `base-tools/`, like
`base/` but with tokenizers made for programs and for tool calls; --long adds `base-long/`, which is `base/` for
sequences of 4,096 tokens, for long-context.yaml and the recipes of software engineering. The same seed writes the same
files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from base_model import train_tokenizer, train_tool_tokenizer, write_base
from tasks.choices import distinct_choices
from tasks.errands import distinct_errands, play
from tasks.lists import distinct_list_tasks
from tasks.notes import NoteTask, all_note_tasks
from tasks.programs import distinct_code_tasks
from tasks.sums import Sum, all_sums
from tasks.verdicts import draw_pair

from millrace.data.datasets import read_rows
from millrace.environments.python_tool import NAME as TOOL
from millrace.environments.python_tool import TOOLS
from millrace.environments.workplace_assistant import WorkplaceEnvironment

logger = logging.getLogger("make_data")

Row = dict[str, Any]

TRAIN_PROMPTS = {"math": 1200, "instruction_following": 1200, "mcqa": 600, "chat": 600}
"""MOPD draws its prompts from the domains by their sizes, and math is what it has to bring back."""
HELD_OUT_PROMPTS = {"math": 128, "instruction_following": 128, "mcqa": 128, "chat": 64}
"""A chat answer takes two verdicts of a judge, and so the most time."""
NOISY_CONVERSATIONS = {"math": 7000, "instruction_following": 7000}
CASCADE_CONVERSATIONS = {"math": 7000, "instruction_following": 5000, "mcqa": 4000, "chat": 2000}
JUDGED_PAIRS, HELD_OUT_PAIRS = 12000, 500
CODE_PROBLEMS, HELD_OUT_CODE_PROBLEMS, CODE_CONVERSATIONS = 1200, 128, 12000
HELD_OUT_ERRANDS, TOOL_CONVERSATIONS = 128, 8000
PYTHON_CONVERSATIONS = 2000
LONG_POSITIONS = 4096
REFERENCE_CARE = 0.75
"""Chance that a held-out reference note has one of the four parts of a good note."""


class Task(Protocol):
    def row(self) -> Row:
        """The prompt with what its environment needs."""
        ...

    def demonstrate(self, rng: random.Random) -> str: ...


AnyTask = TypeVar("AnyTask", bound=Task)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    aside = path.with_suffix(".tmp")
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    aside.replace(path)
    logger.info("%s: %d rows", path, len(lines))


def write_prompts(folder: Path, train: Iterable[Row], held_out: Iterable[Row]) -> None:
    for name, rows in (("train", train), ("held_out", held_out)):
        write_jsonl(folder / f"{name}.jsonl", ({"id": f"{name}-{i}", **row} for i, row in enumerate(rows)))


def conversations(
    tasks: Sequence[AnyTask], answer: Callable[[AnyTask, random.Random], str], count: int, rng: random.Random
) -> list[Row]:
    """Demonstrations of tasks drawn at random."""
    drawn = (rng.choice(tasks) for _ in range(count))
    return [
        {
            "messages": [
                {"role": "user", "content": task.row()["prompt"]},
                {"role": "assistant", "content": answer(task, rng)},
            ]
        }
        for task in drawn
    ]


def write_domains(folder: Path, rng: random.Random) -> dict[str, Sequence[Task]]:
    """Write the prompts of each domain; returns its training tasks."""
    counts = {domain: HELD_OUT_PROMPTS[domain] + train for domain, train in TRAIN_PROMPTS.items()}
    drawn: dict[str, Sequence[Task]] = {
        "math": rng.sample(all_sums(), k=counts["math"]),
        "instruction_following": distinct_list_tasks(rng, counts["instruction_following"]),
        "mcqa": distinct_choices(rng, counts["mcqa"]),
        "chat": rng.sample(all_note_tasks(), k=counts["chat"]),
    }
    train_tasks = {}
    for domain, tasks in drawn.items():
        held_out, train = tasks[: HELD_OUT_PROMPTS[domain]], tasks[HELD_OUT_PROMPTS[domain] :]
        rows = [held_out_note(task, rng) if isinstance(task, NoteTask) else task.row() for task in held_out]
        write_prompts(folder / domain, [task.row() for task in train], rows)
        train_tasks[domain] = train
    return train_tasks


def held_out_note(task: NoteTask, rng: random.Random) -> Row:
    return {**task.row(), "reference": task.draw(rng, REFERENCE_CARE)}


def write_conversations(path: Path, rows: list[Row], rng: random.Random) -> list[Row]:
    rng.shuffle(rows)
    write_jsonl(path, rows)
    return rows


def write_data(folder: Path, seed: int) -> list[str]:
    """Write all data; returns the texts that the tokenizer is trained on."""
    rng = random.Random(seed)
    tasks = write_domains(folder, rng)
    noisy = [
        row
        for domain, count in NOISY_CONVERSATIONS.items()
        for row in conversations(tasks[domain], lambda task, rng: task.demonstrate(rng), count, rng)
    ]
    cascade = [
        row
        for domain, count in CASCADE_CONVERSATIONS.items()
        for row in conversations(tasks[domain], cascade_answer, count, rng)
    ]
    notes: Any = tasks["chat"]
    pairs = [draw_pair(rng.choice(notes), rng) for _ in range(JUDGED_PAIRS + HELD_OUT_PAIRS)]
    write_jsonl(folder / "judge" / "held_out.jsonl", pairs[:HELD_OUT_PAIRS])
    rows = [
        *write_conversations(folder / "sft.jsonl", noisy, rng),
        *write_conversations(folder / "cascade" / "sft.jsonl", cascade, rng),
        *write_conversations(folder / "judge" / "train.jsonl", pairs[HELD_OUT_PAIRS:], rng),
    ]
    return texts_of(rows)


def write_code_data(folder: Path, seed: int) -> list[str]:
    """Write the programming problems and their demonstrations; returns the texts that their tokenizer is trained on."""
    rng = random.Random(seed)
    problems = distinct_code_tasks(rng, CODE_PROBLEMS + HELD_OUT_CODE_PROBLEMS)
    held_out, train = problems[:HELD_OUT_CODE_PROBLEMS], problems[HELD_OUT_CODE_PROBLEMS:]
    write_prompts(folder, (task.row() for task in train), (task.row() for task in held_out))
    rows = conversations(train, lambda task, rng: task.demonstrate(rng), CODE_CONVERSATIONS, rng)
    return texts_of(write_conversations(folder / "sft.jsonl", rows, rng))


def write_tool_data(folder: Path, seed: int) -> list[Row]:
    """Write the errands and their demonstrations; returns the latter."""
    rng, environment = random.Random(seed), WorkplaceEnvironment(None)
    errands = distinct_errands(seed)
    held_out, train = errands[:HELD_OUT_ERRANDS], errands[HELD_OUT_ERRANDS:]
    write_prompts(folder, (errand.row() for errand in train), (errand.row() for errand in held_out))
    drawn = [rng.choice(train) for _ in range(TOOL_CONVERSATIONS)]

    async def play_all() -> list[Row]:
        return [await play(environment, errand.row(), errand.demonstrate(rng)) for errand in drawn]

    return write_conversations(folder / "sft.jsonl", asyncio.run(play_all()), rng)


def write_python_data(folder: Path, seed: int) -> None:
    """Write conversations about the training prompts of `math`, each with one call of the environment's tool."""
    rng = random.Random(seed)
    held_out = {row["prompt"] for row in read_rows(folder / "math" / "held_out.jsonl")}
    sums = [one for one in all_sums() if one.row()["prompt"] not in held_out]
    rows = [{"messages": one.with_python(TOOL), "tools": TOOLS} for one in rng.choices(sums, k=PYTHON_CONVERSATIONS)]
    write_jsonl(folder / "python" / "sft.jsonl", rows)


def texts_of(rows: list[Row]) -> list[str]:
    return [message["content"] for row in rows for message in row["messages"]]


def cascade_answer(task: Task, rng: random.Random) -> str:
    """Right in math, and as noisy as ever elsewhere."""
    return task.work_out() if isinstance(task, Sum) else task.demonstrate(rng)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the base model and the data of the laptop recipes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of the data and of the base's weights")
    parser.add_argument("--moe", action="store_true", help="also write the mixture-of-experts base")
    parser.add_argument("--hybrid", action="store_true", help="also write the hybrid base, with Mamba-2 layers")
    parser.add_argument("--code", action="store_true", help="also write programming problems, and a base for them")
    parser.add_argument("--tools", action="store_true", help="also write errands with tool calls, and a base for them")
    parser.add_argument("--python", action="store_true", help="also write sums worked out by calls of Python")
    parser.add_argument("--long", action="store_true", help="also write the base for sequences of 4,096 tokens")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    texts = write_data(options.out, options.seed)
    tokenizer = train_tokenizer(texts)
    write_base(options.out / "base", tokenizer, options.seed, "dense")
    if options.moe:
        write_base(options.out / "base-moe", tokenizer, options.seed, "moe")
    if options.hybrid:
        write_base(options.out / "base-hybrid", tokenizer, options.seed, "hybrid")
    if options.python:
        write_python_data(options.out, options.seed)
    if options.long:
        write_base(options.out / "base-long", tokenizer, options.seed, "dense", positions=LONG_POSITIONS)
    if options.code:
        code_tokenizer = train_tokenizer(write_code_data(options.out / "code", options.seed))
        write_base(options.out / "base-code", code_tokenizer, options.seed, "dense")
    if options.tools:
        tool_tokenizer = train_tool_tokenizer(write_tool_data(options.out / "tools", options.seed))
        write_base(options.out / "base-tools", tool_tokenizer, options.seed, "dense")


if __name__ == "__main__":
    main()
