"""Conversations that several processes render."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from chat_checkpoints import checkpoint
from tiny_checkpoints import VOCABULARY

from millrace.data import rendering
from millrace.data.datasets import JsonlFile
from millrace.data.errors import DataError
from millrace.data.rendering import render_rows
from millrace.data.tokenizer import ChatTokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    (tmp_path / "model").mkdir()
    return ChatTokenizer(checkpoint(tmp_path / "model"), VOCABULARY, chat_template="nemotron")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "ROWS_ALONE", 0)
    monkeypatch.setattr(rendering, "ROWS_OF_PIECE", 3)
    monkeypatch.setattr(rendering.os, "sched_getaffinity", lambda process: {0, 1})


def write(path: Path, numbers: range, last: str = "assistant") -> JsonlFile:
    """Conversations that differ in turns and lengths; of the last of them the role that speaks."""
    turns = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "r", "content": "a" * number}]
        for number in numbers
    ]
    rows = [{"messages": turn * (1 + number % 3)} for number, turn in enumerate(turns)]
    rows[-1]["messages"][-1]["role"] = last
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return JsonlFile(path, ["messages"])


def rendered(files: list[JsonlFile], tokenizer: ChatTokenizer) -> tuple[list[list[int]], str]:
    rows: list[list[int]] = []
    with pytest.raises(DataError) as error:
        render_rows(files, tokenizer, None, lambda lengths: rows.append(list(lengths)))
    return rows, str(error.value)


def test_rows_come_in_order_up_to_the_first_bad_one_as_from_one_process(
    tmp_path: Path, tokenizer: ChatTokenizer, several: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        write(tmp_path / "1.jsonl", range(1, 9)),
        write(tmp_path / "2.jsonl", range(20, 25), last="user"),
        write(tmp_path / "3.jsonl", range(1), last="user"),
    ]
    rows, problem = rendered(files, tokenizer)
    assert len(rows) == 12 and problem == f"{tmp_path}/2.jsonl:9: the conversation has no assistant message to train on"
    assert multiprocessing.active_children() == []
    monkeypatch.setattr(rendering, "ROWS_ALONE", 1000)
    assert rendered(files, tokenizer) == (rows, problem)


def test_a_process_that_is_killed_is_one_sentence(tmp_path: Path, tokenizer: ChatTokenizer, several: None) -> None:
    file = write(tmp_path / "data.jsonl", range(1, 400))
    killer = threading.Thread(target=kill_one_of_two)  # both still import then
    killer.start()
    with pytest.raises(DataError, match=r"data\.jsonl: a process that was rendering conversations was killed, by"):
        render_rows([file], tokenizer, None, lambda lengths: None)
    killer.join()
    assert multiprocessing.active_children() == []


def kill_one_of_two() -> None:
    def ours() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]

    while len(ours()) < 2:
        time.sleep(0.05)
    time.sleep(0.5)  # the pool takes no notice of a death while it starts another process
    ours()[0].kill()


def test_what_interrupts_the_rendering_leaves_no_process(
    tmp_path: Path, tokenizer: ChatTokenizer, several: None
) -> None:
    file = write(tmp_path / "data.jsonl", range(1, 400))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            render_rows([file], tokenizer, None, lambda lengths: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []
