"""Errands at the office: tasks of the environment `workplace_assistant` that take one search and one change.

The tasks, the tools and their results are the environment's own. A demonstration is played in it: a search, the change
with the address or id that the search has found, and a word at the end. Others make a mistake that an assistant might
make: no search and so a guessed address, no change, another tool, a wrong argument. Each leaves the tables otherwise
than they should be.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from millrace.environments.base import Observation
from millrace.environments.workplace.generate import HOST, generated_office
from millrace.environments.workplace.office import schemas
from millrace.environments.workplace.tasks import Call, Task, distinct_tasks
from millrace.environments.workplace_assistant import WorkplaceEnvironment

Row = dict[str, Any]
Plan = tuple[Call, ...]
"""The calls of an episode, in their order; behind the last one the assistant says that all is done."""

SLIP = 0.4
"""Share of demonstrations with a mistake."""
DONE = "Done."
KINDS = {
    ("email_send_email", "Send"),
    ("calendar_create_event", "Put"),
    ("project_management_create_task", "Put"),
    ("project_management_update_task", "Move"),
}
"""The tool and the first word of the errands; other templates take more searches, or none, or long rows."""
DRAWN, MOST_OF_A_KIND = 6000, 400
"""Tasks that errands are taken from, and errands of a kind: there are many emails to write, but few tasks to move."""

FIND_ADDRESS, FIND_TASK = "company_directory_find_email_address", "project_management_search_tasks"
DELETE_TASK = "project_management_delete_task"


@dataclass(frozen=True)
class Errand:
    task: Task

    @property
    def _change(self) -> Call:
        return self.task.calls[0]

    @property
    def _search(self) -> Call:
        _, arguments = self._change
        if "task_id" in arguments:
            return FIND_TASK, {"task_name": self.task.request.split("'")[1]}
        return FIND_ADDRESS, {"name": self._colleague(arguments)}

    @staticmethod
    def _colleague(arguments: dict[str, str]) -> str:
        """First name of whose address stands in the arguments."""
        address = next(value for value in arguments.values() if value.endswith(HOST))
        return address.split(".")[0].capitalize()

    def right(self) -> Plan:
        return (self._search, self._change)

    def mistakes(self) -> list[Plan]:
        """Ways to go wrong."""
        _, arguments = self._change
        only_searched: Plan = (self._search,)
        if "task_id" in arguments:
            deleted = (DELETE_TASK, {"task_id": arguments["task_id"]})
            return [only_searched, (self._search, deleted), self._changed(field="board")]
        return [only_searched, self._guessed(), *self._other_changes()]

    def _other_changes(self) -> Iterator[Plan]:
        name, arguments = self._change
        if name == "email_send_email":
            yield self._changed(subject=arguments["body"], body=arguments["subject"])
        elif name == "calendar_create_event":
            yield self._changed(duration="60" if arguments["duration"] != "60" else "30")
            yield self._changed(event_start=arguments["event_start"].split()[0])
        else:
            yield self._changed(list_name="In Progress")
            event = {"event_name": arguments["task_name"], "participant_email": arguments["assigned_to_email"]}
            event |= {"event_start": f"{arguments['due_date']} 09:00:00", "duration": "30"}
            yield (self._search, ("calendar_create_event", event))

    def _changed(self, **values: str) -> Plan:
        name, arguments = self._change
        return (self._search, (name, {**arguments, **values}))

    def _guessed(self) -> Plan:
        """Without the search: an address as it might be."""
        name, arguments = self._change
        guess = f"{self._colleague(arguments).lower()}@{HOST}"
        return ((name, {key: guess if value.endswith(HOST) else value for key, value in arguments.items()}),)

    def row(self) -> Row:
        """The task as a data row; offered are the tools that it takes and those that it is mistaken for."""
        called = [name for plan in (self.right(), *self.mistakes()) for name, _ in plan]
        row = self.task.row("needed")
        return {**row, "prompt": self.task.request, "tools": schemas(dict.fromkeys(called))}

    def demonstrate(self, rng: random.Random) -> Plan:
        """The right calls, or some with a mistake."""
        return rng.choice(self.mistakes()) if rng.random() < SLIP else self.right()


async def play(environment: WorkplaceEnvironment, row: Row, plan: Plan) -> Row:
    """An SFT row: the conversation of an episode with these calls, and what the environment answered to each."""
    session, messages = await environment.open(row), list(environment.reset(row))
    for name, arguments in plan:
        function = {"name": name, "arguments": arguments}
        answer = await session.step(f"<tool_call>\n{json.dumps(function)}\n</tool_call>")
        assert isinstance(answer, Observation), "an episode goes on while there are calls"
        call = {"type": "function", "function": function}
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}, *answer.messages]
    await session.close()
    return {"messages": [*messages, {"role": "assistant", "content": DONE}], "tools": row["tools"]}


def distinct_errands(seed: int) -> list[Errand]:
    """Errands with pairwise different requests, in random order."""
    kinds: dict[tuple[str, str], list[Errand]] = {kind: [] for kind in sorted(KINDS)}
    for task in distinct_tasks(generated_office(), seed, DRAWN, most_calls=1):
        kind = (task.calls[0][0], task.request.split()[0])
        if kind in kinds and len(kinds[kind]) < MOST_OF_A_KIND:
            kinds[kind].append(Errand(task))
    errands = [errand for some in kinds.values() for errand in some]
    random.Random(seed).shuffle(errands)
    return errands
