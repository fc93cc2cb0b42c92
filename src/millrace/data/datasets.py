"""JSONL data sets: prompts for rollouts, conversations for supervised fine-tuning.

A file is read once when it is opened, so that a bad row is found before anything is trained, and from then on only
where each row starts is kept in memory: a row is parsed again when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer
from millrace.errors import MillraceError

Row = Mapping[str, Any]
Check = Callable[[Row], str | None]
"""What is wrong with a row, in one sentence, or None."""
Read = Callable[[Row], Row]
"""From a row as the file has it to the row that is checked and used; raises MillraceError for one it cannot read."""


def _as_written(row: Row) -> Row:
    return row


class JsonlFile:
    """The rows of a JSONL file, each, once `read`, an object with the required fields. Blank lines are skipped.

    Raises:
        DataError: the file is missing, empty, or has a bad row; the message names file, line and field.
    """

    def __init__(
        self, path: str | Path, required: Iterable[str] = (), check: Check | None = None, read: Read = _as_written
    ) -> None:
        self.path = Path(path)
        self._required, self._check, self._read = tuple(required), check, read
        self._starts, self._lines = array("Q"), array("Q")
        try:
            with self.path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                self._index(file)
        except OSError as error:
            raise DataError(f"{self.path}: the data file cannot be read: {error.strerror}") from error
        if not self._starts:
            raise DataError(f"{self.path}: the data set is empty; it needs at least one row")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        return self._read(json.loads(self.raw(index)))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def raw(self, index: int) -> bytes:
        """The bytes of the row's line."""
        with self.path.open("rb") as file:
            if _stamp(file.fileno()) != self._stamp:
                raise DataError(f"{self.path}: the data file was changed while it was in use; start again")
            file.seek(self._starts[index])
            return file.readline().strip()

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}:{self._lines[index]}"

    def _index(self, lines: Iterable[bytes]) -> None:
        start = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                problem = self._problem(line)
                if problem:
                    raise DataError(f"{self.path}:{number}: {problem}")
                self._starts.append(start)
                self._lines.append(number)
            start += len(line)

    def _problem(self, line: bytes) -> str | None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f"not valid JSON: {error.msg} at column {error.colno}"
        except UnicodeDecodeError:
            return "not valid UTF-8"
        if not isinstance(row, dict):
            return f"a row must be a JSON object, this is a {type(row).__name__}"
        try:
            read = self._read(row)
        except MillraceError as error:
            return str(error)
        for name in self._required:
            if name not in read:
                return f"the row has no field {name!r} (it has {', '.join(read) or 'none'})"
        return self._check(read) if self._check else None


def read_rows(path: str | Path, required: Iterable[str] = (), check: Check | None = None) -> JsonlFile:
    """Open a JSONL file; see `JsonlFile`."""
    return JsonlFile(path, required, check)


class PromptDataset:
    """Rows that environments make prompts of, each with an id that stays the same wherever the row stands."""

    def __init__(
        self, path: str | Path, required: Iterable[str] = (), check: Check | None = None, read: Read = _as_written
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


@dataclass(frozen=True)
class Conversation:
    """A tokenised conversation; both are of the same length."""

    tokens: list[int]
    loss_mask: list[bool]
    """True where a token is trained on."""


class ConversationDataset:
    """Conversations, {"messages": [{"role", "content"}, ...]} a row, tokenised when asked for.

    Every row is rendered once at opening, so that an overlong one, or one that the chat template refuses, is found
    then.

    Args:
        paths: JSONL files, taken one after the other.
        max_length: longest conversation in tokens.
        drop_overlong: leave longer ones out (`dropped` counts them) instead of raising.

    Raises:
        DataError: a bad file, row or conversation, an overlong one, or none left.
    """

    def __init__(
        self, paths: Sequence[str | Path], tokenizer: ChatTokenizer, *, max_length: int, drop_overlong: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._files = [JsonlFile(path, ["messages"], _messages_problem) for path in paths]
        self._ends = list(accumulate(len(file) for file in self._files))
        self._kept = array("Q")  # rows counted through all files
        self.lengths = array("Q")
        """Tokens of each conversation."""
        self.dropped = 0
        """Conversations left out because they are longer than max_length."""
        for row in range(self._ends[-1]):
            length = len(self._render(row).tokens)
            if length <= max_length:
                self._kept.append(row)
                self.lengths.append(length)
            elif drop_overlong:
                self.dropped += 1
            else:
                raise DataError(
                    f"{self._where(row)}: the conversation has {length} tokens, more than max_length {max_length}; "
                    "raise max_length or set drop_overlong"
                )
        if not self._kept:
            names = ", ".join(str(file.path) for file in self._files)
            raise DataError(f"{names}: all {self.dropped} conversations are longer than max_length {max_length}")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Conversation:
        return self._render(self._kept[index])

    def _place(self, row: int) -> tuple[JsonlFile, int]:
        """The file of a row and the row's index in it."""
        number = bisect_right(self._ends, row)
        return self._files[number], row - (self._ends[number - 1] if number else 0)

    def _render(self, row: int) -> Conversation:
        file, index = self._place(row)
        try:
            return Conversation(*self._tokenizer.render_conversation(file[index]["messages"]))
        except DataError as error:
            raise DataError(f"{self._where(row)}: {error}") from error

    def _where(self, row: int) -> str:
        file, index = self._place(row)
        return file.where(index)


def _messages_problem(row: Row) -> str | None:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "the field 'messages' must be a list of at least one message"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} has no 'role'"
        if message.get("content") is None and not message.get("tool_calls"):
            return f"message {number} has no 'content'"
    return None


def _stamp(descriptor: int) -> tuple[int, int]:
    """Size and time of last change: a rewritten file has other rows at the remembered places."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
