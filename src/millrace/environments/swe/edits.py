"""Edits of files in memory: how they are read from an answer, and their strict application.

Two forms are read. Blocks that search and replace, each below a line with the file's path:

    ### src/shop/cart.py
    <<<<<<< SEARCH
        return price
    =======
        return price * count
    >>>>>>> REPLACE

and unified diffs, as git writes them. What is searched for, and the old side of a hunk, must stand in the file letter
by letter: a hunk where its header says, or, as the lines of a block, at exactly one place. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Files = Mapping[str, str]

SEARCH, DIVIDER, REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"
HEADING = re.compile(r"#{2,4} +`?([^`\s]+)`?\s*$")
HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+(\d+)(?:,\d+)? @@")
FENCE, DIFF_FENCES = "```", ("```diff", "```patch")
MOST_DIGITS = 9
"""Of a line's number."""
NOWHERE = "/dev/null"


class EditError(Exception):
    """No edit can be read, or one does not apply. Its text becomes the reward's reason."""


class NotParsed(EditError):
    """No edit can be read."""


@dataclass(frozen=True)
class Edit:
    """Lines of one file to be replaced. `old` and `new` without any lines: the file is only moved or removed."""

    path: str | None
    """The file before; None for a new one."""
    target: str | None
    """The file behind the edit; None when it is removed."""
    old: tuple[str, ...]
    new: tuple[str, ...]
    at: int | None = None
    """Number of the first old line, counted from 0, where the edit says it."""


def parse_edits(text: str) -> list[Edit]:
    """The edits of a text in their order: its blocks, or, without any, its diffs.

    Raises:
        NotParsed: there is none, or one is not whole.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if any(line.rstrip() == SEARCH for line in lines):
        edits = list(_blocks(lines))
    else:
        edits = [edit for part in _fenced(lines) or [lines] for edit in _diff(part)]
    if not edits:
        raise NotParsed("no edit in the answer")
    return edits


def apply_edits(files: Files, edits: Sequence[Edit]) -> dict[str, str]:
    """The files behind the edits, each applied to what the ones before left.

    Raises:
        EditError: one does not apply.
    """
    changed = {path: content.replace("\r\n", "\n") for path, content in files.items()}
    for number, edit in enumerate(edits, 1):
        try:
            _apply(changed, edit)
        except EditError as error:
            raise EditError(f"edit {number} does not apply: {error}") from None
    return changed


def _apply(files: dict[str, str], edit: Edit) -> None:
    if edit.path is None:
        assert edit.target is not None
        if edit.target in files:
            raise EditError(f"it creates {edit.target}, which is there")
        files[edit.target] = "".join(f"{line}\n" for line in edit.new)
        return
    if edit.path not in files:
        raise EditError(f"{edit.path} is not among the files")
    lines = files[edit.path].split("\n")
    if edit.old or edit.new:
        at = _place(lines, edit)
        lines[at : at + len(edit.old)] = edit.new
    if edit.target != edit.path:
        del files[edit.path]
        if edit.target is not None and edit.target in files:
            raise EditError(f"it moves {edit.path} to {edit.target}, which is there")
    if edit.target is not None:
        files[edit.target] = "\n".join(lines)


def _place(lines: Sequence[str], edit: Edit) -> int:
    old, count = list(edit.old), len(edit.old)
    if edit.at is not None and 0 <= edit.at <= len(lines) and lines[edit.at : edit.at + count] == old:
        return edit.at
    if not old:
        raise EditError(f"it searches for nothing in {edit.path}, which is there")
    found = [at for at, line in enumerate(lines) if line == old[0] and lines[at : at + count] == old]
    if len(found) != 1:
        where = "is not" if not found else f"stands {len(found)} times"
        raise EditError(f"what it replaces {where} in {edit.path}")
    return found[0]


# ---- blocks


def _blocks(lines: Sequence[str]) -> Iterator[Edit]:
    path, rest = None, iter(lines)
    for line in rest:
        if heading := HEADING.fullmatch(line.strip()):
            path = _plain(heading.group(1))
        elif line.rstrip() == SEARCH:
            old, new = _until(rest, DIVIDER), _until(rest, REPLACE)
            if path is None:
                raise NotParsed("an edit without the path of its file above")
            # A new file is one that is searched for nothing.
            yield Edit(path if old else None, path, old, new)


def _until(lines: Iterator[str], mark: str) -> tuple[str, ...]:
    taken: list[str] = []
    for line in lines:
        if line.rstrip() == mark:
            return tuple(taken)
        taken.append(line)
    raise NotParsed(f"an edit without its line {mark}")


# ---- unified diffs


def _fenced(lines: Sequence[str]) -> list[list[str]]:
    """The lines of each fenced block that says it is a diff."""
    blocks: list[list[str]] = []
    block: list[str] | None = None
    for line in lines:
        if block is None:
            block = [] if line.rstrip() in DIFF_FENCES else None
        elif line.rstrip() == FENCE:
            blocks.append(block)
            block = None
        else:
            block.append(line)
    return blocks


def _diff(lines: Sequence[str]) -> Iterator[Edit]:
    path: str | None = None
    target: str | None = None
    opened, number = False, 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("rename from ") and number + 1 < len(lines) and lines[number + 1].startswith("rename to "):
            path, target = line[len("rename from ") :], lines[number + 1][len("rename to ") :]
            yield Edit(path, target, (), ())
            number += 2
        elif _opens_file(lines, number):
            old, new = _named(line), _named(lines[number + 1])
            if old is None and new is None:
                raise NotParsed("a diff without a file")
            # What was renamed above is there under its new name already.
            path, target, opened = (new if old == path and new == target else old), new, True
            number += 2
        elif hunk := HUNK.match(line):
            if not opened:
                raise NotParsed("a hunk without the name of its file above")
            body, number = _body(lines, number + 1, _line_number(hunk.group(1) or "1"))
            yield _edit_of_hunk(path, target, body, _line_number(hunk.group(2)))
            path = target
        else:
            number += 1


def _opens_file(lines: Sequence[str], number: int) -> bool:
    return lines[number].startswith("--- ") and number + 1 < len(lines) and lines[number + 1].startswith("+++ ")


def _named(line: str) -> str | None:
    name = line[4:].split("\t")[0].strip()
    return None if name == NOWHERE else _plain(re.sub(r"^[ab]/", "", name))


def _plain(path: str) -> str:
    return path.removeprefix("./")


def _body(lines: Sequence[str], number: int, old_lines: int) -> tuple[list[str], int]:
    """The lines of a hunk, and where the next thing begins. An empty line is one of the context whose space was lost,
    unless the old side is complete: then it stands behind the diff."""
    body: list[str] = []
    while (
        number < len(lines) and not lines[number].startswith(("@@ -", "diff --git ")) and not _opens_file(lines, number)
    ):
        line = lines[number]
        if line and line[0] not in " +-\\":
            break
        body.append(line or " ")
        number += 1
    while body and body[-1] == " " and sum(line[0] in " -" for line in body) > old_lines:
        body.pop()
    return body, number


def _line_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise NotParsed(f"a hunk at a line whose number has {len(digits)} digits")
    return int(digits)


def _edit_of_hunk(path: str | None, target: str | None, body: Sequence[str], first: int) -> Edit:
    old = tuple(line[1:] for line in body if line[0] in " -")
    new = tuple(line[1:] for line in body if line[0] in " +")
    if path is None and target is None:
        raise NotParsed("a hunk behind the one that removes its file")
    if path is None and old:
        raise NotParsed("a diff of a new file with old lines in it")
    # Where the new lines begin is where the old ones stand once the hunks above are applied.
    return Edit(path, target, old, new, at=first - 1 if new else first)
