"""Repairs of an issue without execution, as in the agentless stage of Nemotron-Cascade 2 (arXiv 2603.19220, 4.8.1).

A row, as of Nemotron-Cascade-RL-SWE, has `instance_id`, `golden_patch` (a unified diff), `relevant_file_contents` (the
files by path, as an object, as its JSON text, or as a list of {"path", "content"}), `original_prompt` (the issue), and
perhaps `prompt`, which is asked as it stands; without it a prompt is made of issue and files. The answer's edits are
applied to the files in memory (`swe.edits`). Reward 1 when the result is that of the golden patch, 0 when nothing was
changed or the edits cannot be read or applied, else a judge's score from 0 to 1: whether the change fixes the same
fault. A score that cannot be had masks the answer.

A row with `task: localisation` asks which of the files have to be changed. The reward is the share of the golden
patch's files among the first five that the answer names; no judge is asked.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.environments.answer import final_text
from millrace.environments.base import Message, Reward
from millrace.environments.judge import Judge, last_object
from millrace.environments.judge_prompt import sections
from millrace.environments.prompts import opening_messages, prompt_problem
from millrace.environments.swe.edits import EditError, NotParsed, apply_edits, parse_edits
from millrace.environments.swe.prompts import localisation_prompt, repair_prompt

TASK = """\
Below are an issue of a software project, a reference patch that fixes it, and the patch of a candidate. Nothing can \
be run. Judge by reading whether the candidate's patch fixes the same fault.

{shown}

The candidate may take another way than the reference. Ask whether the behaviour that the issue complains of is gone \
in all cases that the reference covers, whether the code is valid, and whether anything else is broken. Comments in \
the patches are no evidence.

Score from 0 to 10: 0 has nothing to do with the fault, 3 is at the right place but does not fix it, 5 fixes a part, \
8 fixes it with a flaw elsewhere, 10 fixes it as well as the reference.

Give your reasons briefly, then end with one JSON object and nothing behind it:
{{"score": SCORE}}"""

TASKS = ("repair", "localisation")
HIGHEST = 10
MOST_EDITS = 200
"""Edits of an answer that are still applied."""
MOST_NAMED = 5
"""Paths of an answer that count, the first ones."""
CONTEXT_LINES = 6
"""Lines around a change that the judge sees."""
NOT_ASKED = {"verdicts": 0.0, "failed": 0.0, "unparsable": 0.0, "seconds": 0.0}


class SweAgentlessEnvironment:
    required_fields: Sequence[str] = ("instance_id", "golden_patch", "relevant_file_contents")

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def validate(self, row: Mapping[str, Any]) -> str | None:
        if row.get("task", "repair") not in TASKS:
            return f"task must be one of {', '.join(TASKS)}, not {row['task']!r}"
        if not isinstance(row["golden_patch"], str):
            return f"golden_patch must be a unified diff, not {type(row['golden_patch']).__name__}"
        try:
            files = files_of(row)
            parse_edits(row["golden_patch"])
        except ValueError as error:
            return f"relevant_file_contents {error}"
        except EditError as error:
            return f"golden_patch is no unified diff: {error}"
        if not files:
            return "relevant_file_contents is empty"
        if "prompt" in row:
            return prompt_problem(row["prompt"])
        issue = row.get("original_prompt")
        return None if isinstance(issue, str) and issue.strip() else "the row has neither prompt nor original_prompt"

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        if "prompt" in row:
            return opening_messages(row["prompt"])
        files, issue = files_of(row), row["original_prompt"]
        if _localises(row):
            return opening_messages(localisation_prompt(issue, files, MOST_NAMED))
        return opening_messages(repair_prompt(issue, files))

    async def step(self, row: Mapping[str, Any], transcript: Sequence[Message], answer: str) -> Reward:
        text = final_text(answer)
        return _localisation(row, text) if _localises(row) else await self._repair(row, transcript, text)

    async def close(self) -> None:
        await self._judge.close()

    async def _repair(self, row: Mapping[str, Any], transcript: Sequence[Message], text: str) -> Reward:
        files = {path: content.replace("\r\n", "\n") for path, content in files_of(row).items()}
        try:
            edits = parse_edits(text)
            if len(edits) > MOST_EDITS:
                raise NotParsed(f"more than {MOST_EDITS} edits in the answer")
            repaired = apply_edits(files, edits)
        except NotParsed as error:
            return _unasked(0.0, str(error), parsed=False, applied=False)
        except EditError as error:
            return _unasked(0.0, str(error), applied=False)
        if repaired == files:
            return _unasked(0.0, "nothing was changed")
        if repaired == golden_result(row, files):
            return _unasked(1.0, "as the golden patch")
        # Shown as a diff of the files, so that nothing but the change itself speaks to the judge.
        change = await asyncio.to_thread(diff_of, files, repaired)
        issue = row.get("original_prompt") or transcript[-1]["content"]
        shown = sections({"issue": issue, "reference patch": row["golden_patch"], "candidate patch": change})
        told = await self._judge.ask([{"role": "user", "content": TASK.format(shown=shown)}], parse_score)
        details = {"parsed": 1.0, "applied": 1.0, **told.details()}
        if told.value is None:
            return Reward(0.0, told.reason, details, masked=True)
        return Reward(told.value, f"the judge's score is {told.value:g}", details)


def files_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The row's files by path. Raises ValueError, which says what they must be."""
    given = row["relevant_file_contents"]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"is text, but no JSON: {error}") from None
    if isinstance(given, list) and all(isinstance(each, Mapping) for each in given):
        given = {each.get("path"): each.get("content") for each in given}
    if not isinstance(given, Mapping) or not all(isinstance(part, str) for item in given.items() for part in item):
        raise ValueError('must be the contents of files by their paths, or a list of {"path", "content"}')
    return dict(given)


def golden_result(row: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, str] | None:
    """The files behind the golden patch; None where it also changes files that the row does not have."""
    try:
        return apply_edits(files, parse_edits(row["golden_patch"]))
    except EditError:
        return None


def diff_of(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """The change of files as unified diffs."""
    parts: list[str] = []
    for path in dict.fromkeys([*before, *after]):
        if before.get(path) != after.get(path):
            old, new = ((each[path].split("\n") if path in each else []) for each in (before, after))
            names = (f"a/{path}" if path in before else "/dev/null", f"b/{path}" if path in after else "/dev/null")
            parts += difflib.unified_diff(old, new, *names, n=CONTEXT_LINES, lineterm="")
    return "\n".join(parts)


def parse_score(text: str) -> float | None:
    """The score of the last JSON object of the final text, as a share of the highest; None where there is none."""
    found = last_object(text)
    score = None if found is None else found.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= HIGHEST:
        return None
    return score / HIGHEST


def _localises(row: Mapping[str, Any]) -> bool:
    return row.get("task") == "localisation"


def _localisation(row: Mapping[str, Any], text: str) -> Reward:
    named = [line.strip().strip("`").removeprefix("./") for line in _last_fenced(text).splitlines()]
    named = list(dict.fromkeys(name for name in named if name))[:MOST_NAMED]
    if not named:
        return _unasked(0.0, "no paths in a fenced block", parsed=False, applied=False)
    wanted = {edit.path or edit.target for edit in parse_edits(row["golden_patch"])}
    found = len(wanted & set(named))
    return _unasked(found / len(wanted), f"{found} of {len(wanted)} files found")


def _last_fenced(text: str) -> str:
    """The lines of the last fenced block that closes, without the one that opens it."""
    *closed, _ = text.split("```")
    blocks = [block for block in closed[1::2] if "\n" in block]
    return blocks[-1].partition("\n")[2] if blocks else ""


def _unasked(value: float, reason: str, *, parsed: bool = True, applied: bool = True) -> Reward:
    return Reward(value, reason, {"parsed": float(parsed), "applied": float(applied), **NOT_ASKED})
