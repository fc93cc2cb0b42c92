"""Instructions that a program can check, in the style of IFEval.

A row has `prompt`, `instruction_id_list` and `kwargs`, a list aligned with the ids (entries that are None are dropped,
as the released data sets write every known key). Only the final text is judged. Binary grading gives 1 when every
instruction is followed, fraction the share that is; the recipe says which, not a row's `grading_mode`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from millrace.environments.answer import final_text
from millrace.environments.base import Message, Reward
from millrace.environments.constraints import find_problem, follows
from millrace.environments.prompts import opening_messages, prompt_problem


class InstructionFollowingEnvironment:
    required_fields: Sequence[str] = ("prompt", "instruction_id_list", "kwargs")

    def __init__(self, *, grading: Literal["binary", "fraction"]) -> None:
        self._grading = grading

    def validate(self, row: Mapping[str, Any]) -> str | None:
        ids, kwargs = row["instruction_id_list"], row["kwargs"]
        if not isinstance(ids, list) or not ids:
            return "instruction_id_list must be a non-empty list of instruction ids"
        if not isinstance(kwargs, list) or len(kwargs) != len(ids):
            return f"kwargs must be a list of {len(ids)} objects, one for each instruction id"
        for instruction_id, given in zip(ids, kwargs, strict=True):
            if given is not None and not isinstance(given, Mapping):
                return f"the kwargs of {instruction_id} must be an object, not {given!r}"
            if problem := find_problem(instruction_id, _present(given)):
                return problem
        return prompt_problem(row["prompt"])

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        return opening_messages(row["prompt"])

    async def step(self, row: Mapping[str, Any], transcript: Sequence[Message], answer: str) -> Reward:
        text = final_text(answer)
        ids = row["instruction_id_list"]
        followed = [follows(text, id_, _present(given)) for id_, given in zip(ids, row["kwargs"], strict=True)]
        share = sum(followed) / len(followed)
        value = share if self._grading == "fraction" else float(all(followed))
        missed = [id_ for id_, kept in zip(ids, followed, strict=True) if not kept]
        return Reward(value, f"missed {', '.join(missed)}" if missed else "all followed", {"followed": share})

    async def close(self) -> None:
        """Nothing is held."""


def _present(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (kwargs or {}).items() if value is not None}
