import asyncio
import csv
import hashlib
import json
import random
from pathlib import Path

import pytest
import yaml
from environment_runs import environment

from millrace.data.datasets import PromptDataset
from millrace.data.errors import DataError
from millrace.environments.base import Observation, Reward, TurnEnvironment
from millrace.environments.gym_rows import plain_row
from millrace.environments.workplace.generate import generated_office
from millrace.environments.workplace.office import schemas
from millrace.environments.workplace.tables import FILES, TablesError, difference, read_office
from millrace.environments.workplace.tasks import TEMPLATES, distinct_tasks
from millrace.environments.workplace.tool import TOOLS
from millrace.errors import MillraceError

EPISODES = yaml.safe_load((Path(__file__).parent / "workplace_episodes.yaml").read_text(encoding="utf-8"))["episodes"]


def said(turn):
    """A turn as the policy writes it."""
    if isinstance(turn, str):
        return turn
    calls = turn if isinstance(turn[0], list) else [turn]
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )


def row_of(calls, **more):
    truth = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
    return {"prompt": "Do it.", "ground_truth": truth, **more}


def play(env, row, turns):
    """What was observed, and the reward. Says "Done." until the episode ends."""

    async def episode():
        session = await env.open(row)
        observed = []
        for turn in [*turns, "Done."]:
            outcome = await session.step(said(turn))
            if isinstance(outcome, Reward):
                await session.close()
                return observed, outcome
            observed += [message["content"] for message in outcome.messages]
        raise AssertionError("the episode did not end")

    return asyncio.run(episode())


@pytest.fixture(scope="module")
def env():
    return environment("workplace_assistant")


@pytest.mark.parametrize("episode", EPISODES, ids=[episode["name"] for episode in EPISODES])
def test_an_episode_written_by_hand_has_its_reward(env, episode):
    row = row_of(episode["want"])
    assert env.validate(row) is None
    observed, reward = play(env, row, episode["turns"])
    assert (reward.value, reward.masked) == (episode["reward"], False)
    assert episode.get("reason", "") in reward.reason
    assert episode.get("told", "") in "\n".join(observed)


def test_there_are_fifty_such_episodes():
    assert len(EPISODES) == len({episode["name"] for episode in EPISODES}) == 50


def test_the_generated_office_is_the_same_everywhere():
    office = generated_office()
    text = json.dumps([[list(row.values()) for row in table] for table in office.tables().values()])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "b4c7f67f41d5e44d"
    assert difference(office, generated_office(2)) is not None


def test_sessions_share_nothing_that_one_of_them_changes(env):
    async def both():
        row = row_of([])
        one, other = await env.open(row), await env.open(row)
        await one.step(said(["email_delete_email", {"email_id": "00002001"}]))
        return await one.step("Done."), await other.step("Done.")

    one, other = asyncio.run(both())
    assert (one.value, other.value) == (0.0, 1.0)
    assert one.details == {"calls": 1.0, "failed_calls": 0.0}


def test_a_session_is_cheap_to_open(env):
    row = row_of([])

    async def many():
        return [await env.open(row) for _ in range(2000)]

    assert len(asyncio.run(asyncio.wait_for(many(), 10))) == 2000


@pytest.mark.parametrize(("by", "masked"), [("turns", False), ("tokens", False), ("context", False), ("time", True)])
def test_what_was_done_counts_when_a_limit_cuts_the_episode(env, by, masked):
    row = row_of([("email_delete_email", {"email_id": "00002001"})])

    async def cut(*turns):
        session = await env.open(row)
        for turn in turns:
            await session.step(said(turn))
        return await session.cut(by)

    done = asyncio.run(cut(["email_delete_email", {"email_id": "00002001"}]))
    assert (done.value, done.masked) == (1.0, masked)
    assert done.reason == f"cut by {by}: the tables are as they should be"
    assert asyncio.run(cut()).value == 0.0


def test_all_27_tools_are_offered_unless_the_row_has_its_own(env):
    assert isinstance(env, TurnEnvironment)
    assert len(env.tools(row_of([]))) == len(TOOLS) == 27
    assert env.tools(row_of([], tools=schemas(["email_send_email"])))[0]["function"]["name"] == "email_send_email"
    for tool in env.tools(row_of([])):
        parameters = tool["function"]["parameters"]
        assert set(parameters["required"]) <= set(parameters["properties"])


def test_searches_come_in_pages(env):
    search = ["email_search_emails", {"query": "ADA", "page": "2", "page_size": 3, "date_min": "2023-11-01"}]
    (text,), _ = play(env, row_of([]), [search])
    found = json.loads(text)
    assert found["pagination"]["page"] == 2 and len(found["emails"]) == 3
    dates = [email["sent_datetime"] for email in found["emails"]]
    assert dates == sorted(dates, reverse=True) and min(dates) > "2023-11-01"
    (text,), _ = play(env, row_of([]), [["email_search_emails", {"query": "no such thing"}]])
    assert text == "No emails found."
    (text,), _ = play(env, row_of([]), [["email_search_emails", {"page_size": 0}]])
    assert text == "Error: page_size must be a whole number from 1 on"


def test_analytics_count_by_day(env):
    office = generated_office()
    day = office.visits[0]["date_of_visit"]
    visits = [visit for visit in office.visits if visit["date_of_visit"] == day]
    bounds = {"time_min": day, "time_max": day}
    calls = [
        ["analytics_total_visits_count", bounds],
        ["analytics_engaged_users_count", bounds],
        ["analytics_traffic_source_count", {**bounds, "traffic_source": "direct"}],
        ["analytics_get_average_session_duration", bounds],
    ]
    observed, _ = play(env, row_of([]), [calls])
    mean = sum(float(visit["session_duration_seconds"]) for visit in visits) / len(visits)
    assert [json.loads(text)[day] for text in observed] == [
        len(visits),
        sum(visit["user_engaged"] == "True" for visit in visits),
        sum(visit["traffic_source"] == "direct" for visit in visits),
        pytest.approx(mean),
    ]


def test_no_call_that_a_policy_can_write_raises(env):
    rng, texts = random.Random(5), ["", "x", "00002001", "2023-11-30", "(", "9" * 5000, "\ud800"]
    values = [*texts, None, -1, 1.5, 10**400, float("inf"), [1], {"a": 1}]

    async def storm():
        session = await env.open(row_of([]))
        for _ in range(3000):
            tool = rng.choice(list(TOOLS.values()))
            arguments = {name: rng.choice(values) for name in tool.parameters if rng.random() < 0.9}
            outcome = await session.step(said([tool.name, arguments]))
            assert isinstance(outcome, Observation)
            "".join(message["content"] for message in outcome.messages).encode()
        return await session.step("Done.")

    assert isinstance(asyncio.run(storm()), Reward)


def test_more_calls_in_a_turn_than_anyone_needs_are_refused(env):
    (text,), reward = play(
        env, row_of([]), [[["email_delete_email", {"email_id": f"0000{2001 + n}"}] for n in range(65)]]
    )
    assert "none was carried out" in text and reward.value == 1.0


@pytest.mark.parametrize(
    ("truth", "sentence"),
    [
        ("x", "ground_truth must be a list of calls, not str"),
        ([{"name": "email_delete_email"}], "ground_truth[0] must be {'name', 'arguments'}"),
        ([{"name": "email_delete_email", "arguments": "{"}], "ground_truth[0].arguments is not JSON"),
        ([{"name": "email_delete_email", "arguments": "[]"}], "ground_truth[0].arguments must be a JSON object"),
        ([{"name": "nothing", "arguments": "{}"}], "ground_truth[0], nothing, fails: there is no tool nothing"),
        (
            [{"name": "email_delete_email", "arguments": '{"email_id": "00000057"}'}],
            "fails: there is no email 00000057; the tables are the generated ones, and the domain's `tables` names",
        ),
    ],
)
def test_a_row_that_these_tables_do_not_fit_is_named(env, truth, sentence):
    assert sentence in env.validate({"prompt": "Do it.", "ground_truth": truth})


# ---- rows of NeMo-Gym and tables of one's own


def write_tables(folder):
    """The generated office with NeMo-Gym's file names."""
    office = generated_office()
    contents = [office.emails, office.events, office.tasks, office.customers, office.visits]
    for (name, columns), rows in zip(FILES.items(), contents, strict=True):
        file = folder / "processed" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, columns)
            writer.writeheader()
            writer.writerows(rows)
    (folder / "raw").mkdir()
    (folder / "raw" / "email_addresses.csv").write_text("\n".join(office.addresses) + "\n", encoding="utf-8")


def test_tables_of_a_folder_are_read_as_they_are(tmp_path):
    write_tables(tmp_path)
    office = read_office(tmp_path)
    assert difference(office, generated_office()) is None
    assert list(office.visits) == list(generated_office().visits)
    assert office.addresses == generated_office().addresses
    env = environment("workplace_assistant", tables=str(tmp_path))
    move = ("project_management_update_task", {"task_id": "00002049", "field": "list_name", "new_value": "Completed"})
    assert play(env, row_of([move]), [list(move)])[1].value == 1.0
    assert env.validate(row_of([("email_delete_email", {"email_id": "1"})])).count(str(tmp_path)) == 1


def test_a_folder_of_tables_that_lacks_something_is_named(tmp_path):
    write_tables(tmp_path)
    emails = tmp_path / "processed" / "emails.csv"
    lines = emails.read_text(encoding="utf-8").splitlines(keepends=True)
    emails.write_text("".join([*lines, lines[1], lines[2]]), encoding="utf-8")
    with pytest.raises(TablesError, match=r"emails\.csv:\d+: email_id 00002001 is there twice"):
        read_office(tmp_path)
    emails.write_text("email_id,body\n1,x\n", encoding="utf-8")
    with pytest.raises(TablesError, match=r"emails\.csv has no column inbox/outbox"):
        read_office(tmp_path)
    emails.unlink()
    with pytest.raises(TablesError, match=r"has no table emails\.csv"):
        read_office(tmp_path)


def test_a_row_of_nemo_gym_is_read_as_it_is(tmp_path, env):
    tool = {"type": "function", "name": "email_delete_email", "description": "d", "parameters": {}, "strict": False}
    row = {
        "id": 3,
        "responses_create_params": {
            "input": [{"role": "system", "content": "It is Thursday."}, {"role": "user", "content": "Delete it."}],
            "tools": [tool],
            "parallel_tool_calls": False,
        },
        "ground_truth": [{"name": "email_delete_email", "arguments": '{"email_id": "00002001"}'}],
        "category": "workplace_assistant_email",
        "environment_name": "workplace_assistant",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (read,) = [PromptDataset(path, env.required_fields, env.validate, plain_row)[0]]
    assert env.tools(read) == [
        {"type": "function", "function": {"name": "email_delete_email", "description": "d", "parameters": {}}}
    ]
    assert [message["role"] for message in env.reset(read)] == ["system", "user"]
    assert play(env, read, [["email_delete_email", {"email_id": "00002001"}]])[1].value == 1.0
    path.write_text(json.dumps({**row, "ground_truth": None}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="the row has no ground_truth"):
        PromptDataset(path, env.required_fields, env.validate, plain_row)


# ---- generated tasks


def test_generated_tasks_are_solved_by_their_own_calls_and_by_nothing_else(env):
    tasks = distinct_tasks(generated_office(), 7, 300, most_calls=6)
    assert len({task.request for task in tasks}) == 300
    assert {task.category.removeprefix("workplace_assistant_") for task in tasks} == set(TEMPLATES)
    for task in tasks:
        row = task.row("needed")
        assert env.validate(row) is None
        offered = {tool["function"]["name"] for tool in row["tools"]}
        assert {name for name, _ in task.calls} <= offered
        assert play(env, row, [[list(call)] for call in task.calls])[1].value == 1.0
        assert play(env, row, [])[1].value == 0.0
        assert play(env, row, [[list(call)] for call in task.calls[:-1]])[1].value == 0.0


def test_tasks_of_a_seed_are_the_same_and_no_longer_than_asked_for():
    office = generated_office()
    first, again, other = (distinct_tasks(office, seed, 50, most_calls=1) for seed in (1, 1, 2))
    assert first == again != other
    assert all(len(task.calls) == 1 for task in first)
    with pytest.raises(MillraceError, match="only 0 were found; ask for fewer"):
        distinct_tasks(office, 1, 10, most_calls=0)
