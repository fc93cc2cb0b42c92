"""Mathematics with one final answer in `\\boxed{}`.

A row has `prompt` (a string, or a list of messages) and `answer` (a number, or a string such as `\\frac{1}{2}`), which
NeMo-Gym calls `expected_answer` (`gym_rows` reads both). Reward 1 when the last box of the final text equals the
answer, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from millrace.environments.answer import final_text, last_boxed
from millrace.environments.base import Message, Reward
from millrace.environments.prompts import opening_messages, prompt_problem
from millrace.environments.verifier_pool import VerifierPool

CHECK = "millrace.environments.math_check:equal"
LONGEST_ANSWER = 2000
"""Characters of a box that are still compared; a final answer is shorter."""


class MathEnvironment:
    required_fields: Sequence[str] = ("prompt", "answer")

    def __init__(self, *, verify_timeout_s: float, workers: int) -> None:
        self.pool = VerifierPool(CHECK, workers=workers, limit_s=verify_timeout_s)

    def validate(self, row: Mapping[str, Any]) -> str | None:
        answer = row["answer"]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            return f"answer must be a number or a non-empty string such as '\\frac{{1}}{{2}}', not {answer!r}"
        return prompt_problem(row["prompt"])

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        return opening_messages(row["prompt"])

    async def step(self, row: Mapping[str, Any], transcript: Sequence[Message], answer: str) -> Reward:
        boxed = last_boxed(final_text(answer))
        if boxed is None:
            return _reward(False, "no boxed answer", boxed=False)
        if len(boxed) > LONGEST_ANSWER:
            return _reward(False, "boxed answer too long")
        reference, given = _bare(str(row["answer"])), boxed.strip()
        if given == reference:  # most right answers are spelt like the reference, and need no process
            return _reward(True, "correct")
        verdict = await self.pool.verify(reference, given)
        if verdict.outcome != "done":
            return _reward(False, verdict.reason, failed=True)
        if verdict.result is None:
            return _reward(False, "reference answer cannot be read")
        return _reward(verdict.result, "correct" if verdict.result else "wrong")

    async def close(self) -> None:
        await self.pool.close()


def _bare(reference: str) -> str:
    """The reference without a box or dollar signs around it; data sets write it with and without."""
    boxed = last_boxed(reference)
    return (reference if boxed is None else boxed).strip().strip("$").strip()


def _reward(correct: bool, reason: str, *, boxed: bool = True, failed: bool = False) -> Reward:
    return Reward(float(correct), reason, {"boxed": float(boxed), "verifier_failed": float(failed)})
