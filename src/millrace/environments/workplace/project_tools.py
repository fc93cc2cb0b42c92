"""The boards of the projects."""

from __future__ import annotations

from typing import Any

from millrace.environments.workplace.tables import TASK_COLUMNS, Office
from millrace.environments.workplace.tool import ToolFailed, address, holds, one_of, row_of, tool

LISTS = ("Backlog", "In Progress", "In Review", "Completed")
BOARDS = ("Back end", "Front end", "Design")
CHANGEABLE = TASK_COLUMNS[1:]


@tool(
    "project_management_get_task_information_by_id",
    "Reads one field of a task.",
    task_id="The task's id, eight digits",
    field=f"The field: {', '.join(TASK_COLUMNS)}",
)
def get_task(office: Office, task_id: str, field: str) -> dict[str, Any]:
    row = row_of(office.tasks, task_id, "task")
    return {field: row[one_of("field", field, TASK_COLUMNS)]}


@tool(
    "project_management_search_tasks",
    "Searches the boards for tasks that fit everything that is given.",
    task_name="Text in the task's name",
    assigned_to_email="The whole address of whoever it is assigned to",
    list_name=f"The list: {', '.join(LISTS)}",
    due_date="The day on which it is due, YYYY-MM-DD",
    board=f"The board: {', '.join(BOARDS)}",
)
def search_tasks(
    office: Office,
    task_name: str | None = None,
    assigned_to_email: str | None = None,
    list_name: str | None = None,
    due_date: str | None = None,
    board: str | None = None,
) -> Any:
    texts = {"task_name": task_name, "list_name": list_name, "due_date": due_date, "board": board}
    if assigned_to_email is None and not any(texts.values()):
        raise ToolFailed("say what the tasks must have; nothing was given")
    whose = None if assigned_to_email is None else address("assigned_to_email", assigned_to_email)
    return [
        row
        for row in office.tasks
        if whose in (None, str(row["assigned_to_email"]).lower())
        and all(holds(row[column], text) for column, text in texts.items())
    ]


@tool(
    "project_management_create_task",
    "Puts a task on a board and returns its id.",
    task_name="Name of the task",
    assigned_to_email="Address of whoever it is assigned to",
    list_name=f"The list: {', '.join(LISTS)}",
    due_date="The day on which it is due, YYYY-MM-DD",
    board=f"The board: {', '.join(BOARDS)}",
)
def create_task(
    office: Office, task_name: str, assigned_to_email: str, list_name: str, due_date: str, board: str
) -> str:
    values = {"task_name": task_name, "assigned_to_email": assigned_to_email, "list_name": list_name}
    values |= {"due_date": due_date, "board": board}
    return office.tasks.add({column: _checked(office, column, value) for column, value in values.items()})


@tool("project_management_delete_task", "Deletes a task.", task_id="The task's id, eight digits")
def delete_task(office: Office, task_id: str) -> str:
    row_of(office.tasks, task_id, "task")
    office.tasks.remove(task_id)
    return "The task was deleted."


@tool(
    "project_management_update_task",
    "Changes one field of a task.",
    task_id="The task's id, eight digits",
    field=f"The field: {', '.join(CHANGEABLE)}",
    new_value="What it is to be",
)
def update_task(office: Office, task_id: str, field: str, new_value: str) -> str:
    value = _checked(office, one_of("field", field, CHANGEABLE), new_value)
    row_of(office.tasks, task_id, "task")
    office.tasks.change(task_id, field, value)
    return "The task was changed."


def _checked(office: Office, column: str, value: str) -> str:
    """A value as it is stored. Tasks go only to those who have one."""
    match column:
        case "list_name":
            return one_of(column, value, LISTS)
        case "board":
            return one_of(column, value, BOARDS)
        case "assigned_to_email":
            if value.lower() not in {str(row["assigned_to_email"]).lower() for row in office.tasks}:
                raise ToolFailed("assigned_to_email must be the address of a team member, who has a task already")
            return value.lower()
    return value
