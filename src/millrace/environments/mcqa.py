"""Multiple choice with one right letter, graded as NeMo-Gym's `mcqa` server does.

A row has `prompt`, `options` ([{"A": "its text"}, ...]), `expected_answer` (a letter) and perhaps `grading_mode`:

* `strict_single_letter_boxed`, the default: the last box of the final text holds nothing but the letter, or the letter
  and then `:`, `)`, `.` or `-` and more; a `\\text{}` around either is taken off.
* `lenient_boxed`: else, exactly one option's text stands in that box.
* `lenient_answer_colon`: behind the first `Answer:` stands the letter, or an option's text, and nothing else.
* `lenient_answer_colon_md`: behind the last `Answer:`, perhaps in bold type, that one choice can be read from.

`template_metadata.output_regex`, a pattern or a list of them, comes first: the last match of the first pattern that
gives an answer is it. Patterns come with the data, and so run in a verifier process, which is killed at its limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.environments.answer import final_text
from millrace.environments.base import Message, Reward
from millrace.environments.mcqa_answers import GRADING_MODES, STRICT, Options, read_choice, read_match
from millrace.environments.prompts import opening_messages, prompt_problem
from millrace.environments.verifier_pool import VerifierPool

LAST_MATCHES = "millrace.environments.mcqa_answers:last_matches"


class McqaEnvironment:
    required_fields: Sequence[str] = ("prompt", "expected_answer")

    def __init__(self, *, verify_timeout_s: float, workers: int) -> None:
        self.pool = VerifierPool(LAST_MATCHES, workers=workers, limit_s=verify_timeout_s)

    def validate(self, row: Mapping[str, Any]) -> str | None:
        return (
            _options_problem(row.get("options"), patterns=_patterns(row) is not None)
            or _expected_problem(row)
            or _pattern_problem(row)
            or prompt_problem(row["prompt"])
        )

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        return opening_messages(row["prompt"])

    async def step(self, row: Mapping[str, Any], transcript: Sequence[Message], answer: str) -> Reward:
        text, options, patterns = final_text(answer).strip(), _options(row), _patterns(row)
        choice = None
        if patterns is not None and text:
            verdict = await self.pool.verify(patterns, text)
            if verdict.outcome != "done":
                return _reward(None, row, verdict.reason, failed=True)
            choice = next((c for match in verdict.result if (c := read_match(match, options))), None)
        if choice is None:
            choice = read_choice(text, options, row.get("grading_mode") or STRICT)
        return _reward(choice, row)

    async def close(self) -> None:
        await self.pool.close()


def _reward(choice: str | None, row: Mapping[str, Any], reason: str | None = None, *, failed: bool = False) -> Reward:
    expected = row["expected_answer"].strip().upper()
    correct = choice == expected
    if reason is None:
        reason = "no answer found" if choice is None else "correct" if correct else f"chose {choice}, not {expected}"
    details = {"answered": float(choice is not None), "verifier_failed": float(failed)}
    return Reward(float(correct), reason, details)


def _options(row: Mapping[str, Any]) -> Options:
    """The texts by letter; null ones, as a table format writes the letters of other rows, are left out."""
    return {
        letter.upper(): text
        for option in row.get("options") or ()
        for letter, text in option.items()
        if text is not None
    }


def _patterns(row: Mapping[str, Any]) -> list[str] | None:
    metadata = row.get("template_metadata")
    given = metadata.get("output_regex") if isinstance(metadata, Mapping) else None
    return [given] if isinstance(given, str) else given


def _options_problem(options: Any, *, patterns: bool) -> str | None:
    if options is None and patterns:
        return None
    if not isinstance(options, list) or not options or not all(map(_is_option, options)):
        return f"options must be a list of objects from a letter to its text, such as [{{'A': 'red'}}], not {options!r}"
    return None


def _is_option(option: Any) -> bool:
    return isinstance(option, Mapping) and all(
        len(letter) == 1 and letter.isalpha() and (text is None or isinstance(text, str))
        for letter, text in option.items()
    )


def _expected_problem(row: Mapping[str, Any]) -> str | None:
    expected, letters, mode = row["expected_answer"], _options(row), row.get("grading_mode")
    if not isinstance(expected, str) or not expected.strip():
        return f"expected_answer must be the letter of an option, not {expected!r}"
    if letters and expected.strip().upper() not in letters:
        return f"expected_answer {expected!r} is none of the options {', '.join(letters)}"
    if mode is not None and mode not in GRADING_MODES:
        return f"grading_mode must be one of {', '.join(GRADING_MODES)}, not {mode!r}"
    return None


def _pattern_problem(row: Mapping[str, Any]) -> str | None:
    patterns = _patterns(row)
    if patterns is None:
        return None
    if not isinstance(patterns, list) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        return f"template_metadata.output_regex must be a regular expression or a list of them, not {patterns!r}"
    for pattern in patterns:
        try:
            groups = re.compile(pattern, re.IGNORECASE).groups
        except (re.error, RecursionError, OverflowError) as error:
            return f"template_metadata.output_regex {pattern[:200]!r} is not a regular expression: {error}"
        if groups > 1:
            return f"template_metadata.output_regex {pattern[:200]!r} has {groups} groups; one must capture the answer"
    return None
