"""JSONL data sets: prompts for rollouts, conversations for supervised fine-tuning.

A file is read once when it is opened, so that a bad row is found before anything is trained, and from then on only
where each row starts is kept in memory: a row is parsed again when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from millrace.data.errors import DataError
from millrace.data.kept_index import KeptIndex, Learnt, Places, stamp
from millrace.data.messages import form_problem, messages_problem
from millrace.data.rendering import render_rows, training_sequences
from millrace.data.tokenizer import ChatTokenizer, TrainingSequence
from millrace.errors import MillraceError

Row = Mapping[str, Any]
Check = Callable[[Row], str | None]
"""What is wrong with a row, in one sentence, or None."""
Read = Callable[[Row], Row]
"""From a row as the file has it to the row that is checked and used; raises MillraceError for one it cannot read."""


def as_written(row: Row) -> Row:
    """A row that needs no reading."""
    return row


class JsonlFile:
    """The rows of a JSONL file, each, once `read`, an object with the required fields. Blank lines are skipped.

    Args:
        places: where the rows are, of a file that was checked before and is not read again.

    Raises:
        DataError: the file is missing, empty, or has a bad row; the message names file, line and field.
    """

    def __init__(
        self,
        path: str | Path,
        required: Iterable[str] = (),
        check: Check | None = None,
        read: Read = as_written,
        places: Places | None = None,
    ) -> None:
        self.path = Path(path)
        self._required, self._check, self._read = tuple(required), check, read
        self.places = places or self._find_places()
        """Where the rows are."""

    def __len__(self) -> int:
        return len(self.places.starts)

    def __getitem__(self, index: int) -> Row:
        return self._read(json.loads(self.raw(index)))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def raw(self, index: int) -> bytes:
        """The bytes of the row's line."""
        with self.path.open("rb") as file:
            if stamp(file.fileno()) != self.places.stamp:
                raise DataError(f"{self.path}: the data file was changed while it was in use; start again")
            file.seek(self.places.starts[index])
            return file.readline().strip()

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}:{self.places.lines[index]}"

    def part(self, first: int, end: int) -> JsonlFile:
        """The rows from `first` to before `end`."""
        whole = self.places
        places = Places(whole.stamp, whole.starts[first:end], whole.lines[first:end])
        return JsonlFile(self.path, self._required, self._check, self._read, places)

    def _find_places(self) -> Places:
        try:
            with self.path.open("rb") as file:
                places = Places(stamp(file.fileno()), array("Q"), array("Q"))
                self._check_rows(file, places)
        except OSError as error:
            raise DataError(f"{self.path}: the data file cannot be read: {error.strerror}") from error
        if not places.starts:
            raise DataError(f"{self.path}: the data set is empty; it needs at least one row")
        return places

    def _check_rows(self, lines: Iterable[bytes], places: Places) -> None:
        start = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                problem = _problem(line, self._required, self._check, self._read)
                if problem:
                    raise DataError(f"{self.path}:{number}: {problem}")
                places.starts.append(start)
                places.lines.append(number)
            start += len(line)


def wrong_rows(
    path: str | Path, required: Sequence[str] = (), check: Check | None = None, read: Read = as_written
) -> tuple[int, list[str]]:
    """The rows of a file, and what is wrong with each that `JsonlFile` refuses, with file and line."""
    rows, problems = 0, []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows += 1
                if problem := _problem(line, required, check, read):
                    problems.append(f"{path}:{number}: {problem}")
    return rows, problems


def _problem(line: bytes, required: Sequence[str], check: Check | None, read: Read) -> str | None:
    try:
        written = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return f"not valid JSON at column {error.colno}: {error.msg}"
    except UnicodeDecodeError:
        return "not valid UTF-8"
    if not isinstance(written, dict):
        return f"a row must be a JSON object, this is a {type(written).__name__}"
    try:
        row = read(written)
    except MillraceError as error:
        return str(error)
    for name in required:
        if name not in row:
            return f"the row has no field {name!r} (it has {', '.join(row) or 'none'})"
    return check(row) if check else None


def read_rows(path: str | Path, required: Iterable[str] = (), check: Check | None = None) -> JsonlFile:
    """Open a JSONL file; see `JsonlFile`."""
    return JsonlFile(path, required, check)


class PromptDataset:
    """Rows that environments make prompts of, each with an id that stays the same wherever the row stands."""

    def __init__(
        self, path: str | Path, required: Iterable[str] = (), check: Check | None = None, read: Read = as_written
    ) -> None:
        self._rows = JsonlFile(path, required, check, read)
        self._refuse_repeated_ids()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def row_id(self, index: int) -> str:
        """The row's own `id`, or the first 16 hex digits of its line's SHA-256."""
        line = self._rows.raw(index)
        own = json.loads(line).get("id")
        return hashlib.sha256(line).hexdigest()[:16] if own is None else str(own)

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        return self._rows.where(index)

    def _refuse_repeated_ids(self) -> None:
        seen: dict[str, int] = {}
        for index, row in enumerate(self._rows):
            if row.get("id") is None:
                continue
            first = seen.setdefault(str(row["id"]), index)
            if first != index:
                raise DataError(
                    f"{self._rows.where(index)}: the id {row['id']!r} is also that of {self._rows.where(first)}"
                )


class ConversationDataset:
    """Training sequences of conversations, tokenised when asked for.

    A row is {"messages": [...]}, perhaps with `tools` and `thinking`; it is one sequence, or several where the chat
    template rewrites earlier turns (see `ChatTokenizer.render_conversation`). Every row is rendered once at opening, so
    that an overlong one, or one that the chat template refuses, is found then; what that shows may be kept in a file.

    Args:
        paths: JSONL files, taken one after the other.
        max_length: longest sequence in tokens.
        drop_overlong: leave longer ones out (`dropped` counts them) instead of raising.
        thinking: the form of the rows that do not say it.
        index: a file that keeps what opening shows, so that the next opening need not render; none when absent.
        on_row: called with the rows rendered so far and the rows of all files.

    Raises:
        DataError: a bad file, row or conversation, an overlong one, or none left.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: ChatTokenizer,
        *,
        max_length: int,
        drop_overlong: bool = False,
        thinking: bool | None = None,
        index: Path | None = None,
        on_row: Callable[[int, int], object] = lambda done, rows: None,
    ) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        files = [Path(path) for path in paths]
        kept = KeptIndex(index, tokenizer, thinking) if index else None
        known = kept.read(files) if kept else None
        places = known.places if known else [None] * len(files)
        self._files = [
            JsonlFile(file, ["messages"], conversation_problem, places=placed)
            for file, placed in zip(files, places, strict=True)
        ]
        self._ends = list(accumulate(len(file) for file in self._files))
        self.conversations = self._ends[-1]
        """Rows of all files."""
        self._kept_rows, self._kept_parts = array("Q"), array("L")  # row through all files, sequence in its row
        self.lengths = array("Q")
        """Tokens of each sequence."""
        self.dropped = 0
        """Sequences left out because they are longer than max_length."""
        rows = count()

        def take(lengths: Sequence[int]) -> None:
            row = next(rows)
            self._keep(row, lengths, max_length, drop_overlong)
            on_row(row + 1, self.conversations)

        if known:
            for lengths in known.rows():
                take(lengths)
        else:
            learnt = Learnt([file.places for file in self._files])
            render_rows(self._files, tokenizer, thinking, lambda lengths: take(learnt.add(lengths)))
            if kept:
                kept.write(files, learnt)
        if not self.lengths:
            names = ", ".join(str(file.path) for file in self._files)
            raise DataError(f"{names}: all {self.conversations} conversations are longer than max_length {max_length}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TrainingSequence:
        return self._render(self._kept_rows[index])[self._kept_parts[index]]

    def _keep(self, row: int, lengths: Sequence[int], max_length: int, drop_overlong: bool) -> None:
        for part, length in enumerate(lengths):
            if length <= max_length:
                self._kept_rows.append(row)
                self._kept_parts.append(part)
                self.lengths.append(length)
            elif drop_overlong:
                self.dropped += 1
            else:
                raise DataError(
                    f"{self._where(row)}: the conversation has {length} tokens, more than max_length {max_length}; "
                    "raise max_length or set drop_overlong"
                )

    def _place(self, row: int) -> tuple[JsonlFile, int]:
        """The file of a row and the row's index in it."""
        number = bisect_right(self._ends, row)
        return self._files[number], row - (self._ends[number - 1] if number else 0)

    def _render(self, number: int) -> list[TrainingSequence]:
        file, index = self._place(number)
        return training_sequences(file, index, self._tokenizer, self._thinking)

    def _where(self, row: int) -> str:
        file, index = self._place(row)
        return file.where(index)


def conversation_problem(row: Row) -> str | None:
    """What is wrong with a conversation, in one sentence, or None."""
    return messages_problem(row["messages"]) or form_problem(row)
