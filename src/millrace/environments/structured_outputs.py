"""Answers that are data of a given schema, graded as NeMo-Gym's `structured_outputs` server does.

A row has `prompt`, `schema_str` (a JSON Schema) and perhaps `schema_type`, the format of the answer: json (the
default), yaml, xml, toml or csv. Reward 1 when the whole final text is of the format and validates against the schema
made strict, else 0. What the values say is not scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from millrace.environments.answer import final_text
from millrace.environments.base import Message, Reward
from millrace.environments.prompts import opening_messages, prompt_problem
from millrace.environments.structured_formats import FORMATS
from millrace.environments.structured_schema import schema_problem
from millrace.environments.verifier_pool import VerifierPool

CHECK = "millrace.environments.structured_check:check"


class StructuredOutputsEnvironment:
    required_fields: Sequence[str] = ("prompt", "schema_str")

    def __init__(self, *, verify_timeout_s: float, workers: int) -> None:
        self.pool = VerifierPool(CHECK, workers=workers, limit_s=verify_timeout_s)

    def validate(self, row: Mapping[str, Any]) -> str | None:
        if row.get("response_mode", "text") != "text":
            return f"response_mode is {row['response_mode']!r}, but only answers in text are checked; leave the row out"
        if _schema_type(row) not in FORMATS:
            return f"schema_type must be one of {', '.join(FORMATS)}, not {row['schema_type']!r}"
        problem = schema_problem(row["schema_str"])
        return f"schema_str {problem}" if problem else prompt_problem(row["prompt"])

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        return opening_messages(row["prompt"])

    async def step(self, row: Mapping[str, Any], transcript: Sequence[Message], answer: str) -> Reward:
        text = final_text(answer)
        if not text.strip():
            return _reward("the final text is empty")
        verdict = await self.pool.verify(row["schema_str"], _schema_type(row), text)
        if verdict.outcome != "done":
            return _reward(verdict.reason, failed=True)
        if verdict.result is None:
            return Reward(1.0, "valid", {"parsed": 1.0, "verifier_failed": 0.0})
        kind, sentence = verdict.result
        return _reward(sentence, parsed=kind == "schema")

    async def close(self) -> None:
        await self.pool.close()


def _schema_type(row: Mapping[str, Any]) -> Any:
    return row.get("schema_type") or "json"


def _reward(reason: str, *, parsed: bool = False, failed: bool = False) -> Reward:
    return Reward(0.0, reason, {"parsed": float(parsed), "verifier_failed": float(failed)})
