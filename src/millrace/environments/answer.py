"""What of an answer is judged."""

from __future__ import annotations

import re

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
BOXED = "\\boxed{"
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def final_text(answer: str) -> str:
    """The text after the reasoning: what follows the last `</think>`. Reasoning that was opened and never closed leaves
    nothing to judge."""
    _, closed, after = answer.rpartition(THINK_CLOSE)
    if closed:
        return after
    return "" if THINK_OPEN in answer else answer


def reasoning_text(answer: str) -> str:
    """The reasoning: what stands before the last `</think>`, without the `<think>` that opens it. An answer without
    `</think>` has none, unless it was opened and never closed."""
    before, closed, _ = answer.rpartition(THINK_CLOSE)
    if not closed:
        _, opened, before = answer.partition(THINK_OPEN)
        return before if opened else ""
    return before.lstrip().removeprefix(THINK_OPEN)


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces close, or None. Takes time linear in the text."""
    end = len(text)
    while (start := text.rfind(BOXED, 0, end)) >= 0:
        content = _closed_group(text, start + len(BOXED), end)
        if content is not None:
            return content
        end = start  # what follows was read and does not close this one: an earlier one must close before it
    return None


def _closed_group(text: str, start: int, end: int) -> str | None:
    """The text from `start` to the brace that closes it; `\\{` and `\\}` are letters, not braces."""
    depth = 1
    for brace in BRACE.finditer(text, start, end):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : brace.start()]
    return None
