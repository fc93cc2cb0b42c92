"""An assistant at the office: 27 tools over five databases, graded as NeMo-Gym's `workplace_assistant` does.

A row has `prompt` and `ground_truth`, the calls that solve it ({"name", "arguments": a JSON object as text}), and
perhaps `tools`, the functions that are offered; all when absent. Reward 1 when the tables end as those calls leave
them, else 0. Capitals make no difference but in status, list_name and board.

A call that cannot be read or carried out changes nothing and is answered with a sentence. Two things are told to the
policy where NeMo-Gym is silent: a call that cannot be read does not end the episode, and a search takes its text
literally, not as a regular expression. Reads change no table, so neither changes what is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.environments.base import Cut, Message, Observation, Reward
from millrace.environments.prompts import opening_messages, prompt_problem
from millrace.environments.tool_calls import ToolCallError, parse_tool_calls
from millrace.environments.workplace.generate import generated_office
from millrace.environments.workplace.office import call, schemas, solved
from millrace.environments.workplace.tables import Office, difference, read_office
from millrace.environments.workplace.tool import ToolFailed

MOST_CALLS_A_TURN = 64


class WorkplaceEnvironment:
    required_fields: Sequence[str] = ("prompt", "ground_truth")

    def __init__(self, tables: Path | None) -> None:
        """`tables`: a folder of CSV files in place of the generated office. Raises TablesError for a bad one."""
        self._office = generated_office() if tables is None else read_office(tables)
        self._whose = "the generated ones" if tables is None else str(tables)
        self._schemas = schemas()

    def validate(self, row: Mapping[str, Any]) -> str | None:
        if problem := _calls_problem(row["ground_truth"]):
            return problem
        try:
            solved(self._office, row["ground_truth"])
        except ToolFailed as error:
            return f"{error}; the tables are {self._whose}, and the domain's `tables` names those a row is meant for"
        return prompt_problem(row["prompt"])

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        return opening_messages(row["prompt"])

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return row.get("tools") or self._schemas

    async def open(self, row: Mapping[str, Any]) -> WorkplaceSession:
        return WorkplaceSession(self._office, row["ground_truth"], self.tools(row))

    async def close(self) -> None:
        """Nothing is held."""


class WorkplaceSession:
    """One episode with an office of its own."""

    def __init__(
        self, office: Office, ground_truth: Sequence[Mapping[str, str]], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        self._office, self._expected = office.copy(), solved(office, ground_truth)
        self._tools = tools
        self._calls = self._failed = 0

    async def step(self, answer: str) -> Observation | Reward:
        """The results of an answer's calls, or, for one without any, the reward."""
        try:
            calls = parse_tool_calls(answer, self._tools)
        except ToolCallError as error:
            self._calls, self._failed = self._calls + 1, self._failed + 1
            return Observation([{"role": "tool", "content": f"Error: {error}"}])
        if not calls:
            return self._reward()
        if len(calls) > MOST_CALLS_A_TURN:
            self._calls, self._failed = self._calls + len(calls), self._failed + len(calls)
            return Observation(
                [{"role": "tool", "content": f"Error: more than {MOST_CALLS_A_TURN} calls; none was carried out"}]
            )
        return Observation(
            [{"role": "tool", "name": each.name, "content": self._run(each.name, each.arguments)} for each in calls]
        )

    async def cut(self, by: Cut) -> Reward:
        """The tables count as they are: what was asked for may be done. Time alone is no fault of the answer."""
        reward = self._reward()
        return Reward(reward.value, f"cut by {by}: {reward.reason}", reward.details, masked=by == "time")

    async def close(self) -> None:
        """Nothing is held."""

    def _run(self, name: str, arguments: Mapping[str, Any]) -> str:
        self._calls += 1
        try:
            return call(self._office, name, arguments)
        except ToolFailed as error:
            self._failed += 1
            return f"Error: {error}"

    def _reward(self) -> Reward:
        sentence = difference(self._office, self._expected)
        details = {"calls": float(self._calls), "failed_calls": float(self._failed)}
        return Reward(float(sentence is None), sentence or "the tables are as they should be", details)


def _calls_problem(calls: Any) -> str | None:
    """What is wrong with a row's ground truth, in one sentence, or None."""
    if not isinstance(calls, list):
        return f"ground_truth must be a list of calls, not {type(calls).__name__}"
    for number, each in enumerate(calls):
        where = f"ground_truth[{number}]"
        if not isinstance(each, Mapping) or not all(isinstance(each.get(key), str) for key in ("name", "arguments")):
            return f"{where} must be {{'name', 'arguments'}}, the arguments as JSON text"
        try:
            arguments = json.loads(each["arguments"])
        except ValueError as error:
            return f"{where}.arguments is not JSON: {error}"
        if not isinstance(arguments, dict):
            return f"{where}.arguments must be a JSON object"
    return None
