"""Rendering the conversations of whole files, on all cores where they are many."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING

from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer, TrainingSequence
from millrace.processes import deaf_to_interrupts, end_with_parent

if TYPE_CHECKING:
    from millrace.data.datasets import JsonlFile

ROWS_ALONE = 40_000
"""So many rows are rendered by this process alone: others need the time of some 20,000 rows to start."""
ROWS_OF_PIECE = 250
PIECES_AHEAD = 3
"""Pieces that wait for each process."""

Rendered = tuple[list[list[int]], str | None]
"""Lengths of the sequences of each row up to the first bad one, and what is wrong with that."""

_rendering: tuple[ChatTokenizer, bool | None] | None = None
"""In a process of the pool: what it renders by."""


def training_sequences(
    file: JsonlFile, index: int, tokenizer: ChatTokenizer, thinking: bool | None
) -> list[TrainingSequence]:
    """Those of one conversation; see `ConversationDataset`. Raises DataError, naming the row."""
    row = file[index]
    own = row.get("thinking")
    try:
        return tokenizer.render_conversation(
            row["messages"], tools=row.get("tools"), thinking=thinking if own is None else own
        )
    except DataError as error:
        raise DataError(f"{file.where(index)}: {error}") from error


def render_rows(
    files: Sequence[JsonlFile],
    tokenizer: ChatTokenizer,
    thinking: bool | None,
    take: Callable[[Sequence[int]], object],
) -> None:
    """Give `take` the lengths of the training sequences of every row, in the order of files and rows.

    Raises DataError for the first bad row, or when a process is killed; what `take` raises ends the rendering.
    """
    processes = len(os.sched_getaffinity(0))
    if processes == 1 or sum(len(file) for file in files) <= ROWS_ALONE:
        for file in files:
            for index in range(len(file)):
                take(_lengths(file, index, tokenizer, thinking))
        return
    pieces = (file.part(n, n + ROWS_OF_PIECE) for file in files for n in range(0, len(file), ROWS_OF_PIECE))
    try:
        with _pool(processes, tokenizer, thinking) as pool:
            for rows, problem in _in_order(pool, pieces, processes * PIECES_AHEAD):
                for lengths in rows:
                    take(lengths)
                if problem:
                    raise DataError(problem)
    except BrokenProcessPool:
        raise DataError(
            f"{files[0].path}: a process that was rendering conversations was killed, by the system when memory runs "
            "out; start again, on fewer cores (taskset) in less memory"
        ) from None


def _in_order(pool: ProcessPoolExecutor, pieces: Iterator[JsonlFile], ahead: int) -> Iterator[Rendered]:
    """What becomes of the pieces, of which `ahead` are under way."""
    under_way: deque[Future[Rendered]] = deque()
    for piece in pieces:
        with deaf_to_interrupts():  # processes start as there is work for them
            under_way.append(pool.submit(_render_piece, piece))
        if len(under_way) == ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


@contextmanager
def _pool(processes: int, tokenizer: ChatTokenizer, thinking: bool | None) -> Iterator[ProcessPoolExecutor]:
    """Processes that begin anew, since a fork would take over threads and communicators; killed when the block fails or
    is interrupted."""
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(tokenizer, thinking))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
                process.join()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer: ChatTokenizer, thinking: bool | None) -> None:
    """What each process does first."""
    global _rendering
    end_with_parent()
    _rendering = tokenizer, thinking


def _render_piece(piece: JsonlFile) -> Rendered:
    assert _rendering is not None, "the process has started"
    rows: list[list[int]] = []
    try:
        for index in range(len(piece)):
            rows.append(_lengths(piece, index, *_rendering))
    except DataError as error:
        return rows, str(error)
    return rows, None


def _lengths(file: JsonlFile, index: int, tokenizer: ChatTokenizer, thinking: bool | None) -> list[int]:
    return [len(sequence.tokens) for sequence in training_sequences(file, index, tokenizer, thinking)]
