"""Mathematics with a Python interpreter as tool: the policy may run code, with the state kept from call to call, before
it gives its final answer.

Rows are those of `math`, and the final answer is judged as there. The interpreter has the standard library alone and
runs in the sandbox; what it prints never touches the reward.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.config.schema import PythonToolConfig, SandboxConfig
from millrace.environments.base import Cut, Message, Observation, Reward
from millrace.environments.math import MathEnvironment
from millrace.environments.sandbox.interpreter import Call, Interpreter, SessionLauncher
from millrace.environments.sandbox.run import Limits
from millrace.environments.sandbox.tiers import UNSAFE, choose_tier
from millrace.environments.tool_calls import ToolCall, ToolCallError, parse_tool_calls
from millrace.open_files import allow_many_files

NAME = "stateful_python_code_exec"
TOOLS: Sequence[Mapping[str, Any]] = (
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": (
                "Run Python code. State is kept from call to call, as in a notebook; what the code prints comes back, "
                "and the value of its last line. The standard library is at hand; files, network and processes are not."
            ),
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "The code to run."}},
                "required": ["code"],
            },
        },
    },
)
LONGEST_CODE = 200_000
"""Characters of code that are still run."""
LOST = "The interpreter was ended, and its state is lost: names and imports are gone."


class PythonToolEnvironment:
    """Raises NoSandboxError when code cannot be run safely on this machine."""

    required_fields: Sequence[str] = MathEnvironment.required_fields

    def __init__(self, config: PythonToolConfig, sandbox: SandboxConfig, answers: MathEnvironment) -> None:
        """`answers` judges the final answers."""
        self.answers, self.config = answers, config
        allow_many_files()  # an open session takes two
        self.launcher = SessionLauncher(choose_tier(sandbox.tier))
        self.limits = Limits(
            cpu_s=math.ceil(config.all_calls_s),
            memory_bytes=sandbox.memory_mb << 20,
            output_bytes=sandbox.output_kb << 10,
        )
        self.room = asyncio.Semaphore(sandbox.workers or os.cpu_count() or 1)
        """Calls that run at one time; the time for which a call waits for room is none of its own."""
        self.calls = self.lost = 0

    def validate(self, row: Mapping[str, Any]) -> str | None:
        return self.answers.validate(row)

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        return self.answers.reset(row)

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return TOOLS

    async def open(self, row: Mapping[str, Any]) -> PythonToolSession:
        return PythonToolSession(self, row)

    def summary(self) -> str:
        """What was done so far, in a sentence for the log."""
        warning = ", WITHOUT ISOLATION" if self.launcher.tier == UNSAFE else ""
        return f"sandbox tier {self.launcher.tier}{warning}: {self.calls} calls of Python, {self.lost} lost their state"

    async def close(self) -> None:
        await self.answers.close()


class PythonToolSession:
    def __init__(self, environment: PythonToolEnvironment, row: Mapping[str, Any]) -> None:
        self._environment, self._row, self._config = environment, row, environment.config
        self._interpreter = Interpreter(environment.launcher, environment.limits)
        self._calls, self._failed, self._seconds = 0, 0, 0.0

    async def step(self, answer: str) -> Observation | Reward:
        try:
            calls = parse_tool_calls(answer, TOOLS)
        except ToolCallError as error:
            self._failed += 1
            return _observation([f"Error: {error}"])
        if calls:
            return _observation([await self._run(call) for call in calls])
        reward = await self._environment.answers.step(self._row, (), answer)
        return Reward(reward.value, reward.reason, {**reward.details, **self._details()}, reward.masked)

    async def cut(self, by: Cut) -> Reward:
        """No answer is a wrong one. Time alone, which an episode waits for engines in, is no fault of it."""
        return Reward(0.0, f"no final answer within the limit of {by}", self._details(), masked=by == "time")

    async def close(self) -> None:
        self._interpreter.close()

    async def _run(self, call: ToolCall) -> str:
        """What the policy is shown of a call."""
        code, left = call.arguments.get("code"), self._config.all_calls_s - self._seconds
        if problem := self._refusal(call, code, left):
            self._failed += 1
            return f"Error: {problem}"
        assert isinstance(code, str)
        self._calls += 1
        limit = min(self._config.call_s, left)
        async with self._environment.room:
            done = await self._interpreter.call(code, limit)
        self._seconds += done.seconds
        self._failed += done.ending != "done"
        self._environment.calls += 1
        self._environment.lost += done.lost_state
        return _shown(done, limit, self._config.output_characters)

    def _refusal(self, call: ToolCall, code: Any, left: float) -> str | None:
        if call.name != NAME:
            return f"there is no tool {call.name}; the only one is {NAME}"
        if not isinstance(code, str):
            return f"{NAME} needs the parameter code, a string"
        if len(code) > LONGEST_CODE:
            return f"the code has {len(code)} characters, and the most is {LONGEST_CODE}"
        if self._calls >= self._config.calls:
            return f"all {self._config.calls} calls are used up; give the final answer"
        if left <= 0:
            return f"the {self._config.all_calls_s:g} s of all calls are used up; give the final answer"
        return None

    def _details(self) -> dict[str, float]:
        return {
            "calls": float(self._calls),
            "failed_calls": float(self._failed),
            "call_seconds": self._seconds,
            f"sandbox_{self._environment.launcher.tier}": 1.0,
        }


def _observation(texts: Sequence[str]) -> Observation:
    return Observation([{"role": "tool", "content": text} for text in texts])


def _shown(call: Call, limit: float, most: int) -> str:
    text = call.output.rstrip("\n")
    if len(text) > most:
        left_out = len(text) - most
        text = f"{text[: most - most // 2]}\n[... {left_out} characters left out ...]\n{text[len(text) - most // 2 :]}"
    notes = {
        "time": f"The call was stopped after {limit:.3g} s. {LOST}",
        "output": f"The call was stopped, for it printed too much. {LOST}",
        "died": f"The interpreter ended by itself. {LOST}",
    }
    if call.ending in notes:
        return "\n".join(part for part in (text, notes[call.ending]) if part)
    return text or "[no output]"
