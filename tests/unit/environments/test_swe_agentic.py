"""A scripted agent on tiny repositories with real bugs: verdicts and masks."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from environment_runs import environment

from millrace.config.schema import SweAgenticConfig
from millrace.environments.base import Observation, ReportingEnvironment, TurnEnvironment
from millrace.environments.sandbox.boxes import Unavailable
from millrace.environments.sandbox.run import Limits, Run
from millrace.environments.sandbox.tiers import NoSandboxError, open_tier
from millrace.environments.sandbox.workspace import ApptainerWorkspace, out_of_memory
from millrace.environments.swe.execution import read_outcomes, wrong_tests
from millrace.environments.swe.rows import SweRowError, read_task

SCRIPT = Path(__file__).parents[3] / "recipes/laptop/make_repositories.py"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped repositories: their folder and their rows by kind of bug."""
    try:
        open_tier("bubblewrap").close()
    except Unavailable as error:
        pytest.skip(f"the agent's boxes are bubblewrap's: {error}")
    folder = tmp_path_factory.mktemp("swe")
    subprocess.run([sys.executable, SCRIPT, folder, "--each", "1"], check=True)
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    return folder / "repositories", {row["instance_id"].partition("-")[2]: row for row in rows}


def agent(shipped, **options):
    swe = SweAgenticConfig(container="bubblewrap", repositories=str(shipped[0]), **{"tests_s": 30.0, **options})
    return environment("swe_agentic", swe=swe)


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def shell(command):
    return call("shell", command=command)


def apply(row):
    return shell(f"git apply - <<'END'\n{row['patch']}END")


def play(env, row, *turns, cut=None):
    """What came of each turn, and of the limit that ended the episode."""

    async def episode():
        session = await env.open(row)
        try:
            outcomes = [await session.step(turn) for turn in turns]
            return [*outcomes, await session.cut(cut)] if cut else outcomes
        finally:
            await session.close()

    try:
        return asyncio.run(episode())
    finally:
        asyncio.run(env.close())


def text(observation):
    assert isinstance(observation, Observation)
    return "\n".join(message["content"] for message in observation.messages)


SUBMIT = call("submit")


def test_an_agent_that_mends_the_bug_is_rewarded(shipped):
    row, env = shipped[1]["intervals"], agent(shipped)
    assert isinstance(env, TurnEnvironment) and isinstance(env, ReportingEnvironment) and env.validate(row) is None
    package = row["instance_id"].partition("-")[0]
    assert row["problem_statement"] in env.reset(row)[0]["content"]
    look, view, edit, wrong, reward = play(
        env,
        row,
        shell("git log --oneline | wc -l; grep -c def tests/*.py"),
        call("edit", action="view", path=f"{package}/intervals.py"),
        call("edit", action="replace", path=f"{package}/intervals.py", old="start < merged", text="start <= merged"),
        call("edit", action="replace", path=f"{package}/intervals.py", old="start < merged", text="x"),
        SUBMIT,
    )
    assert text(look).splitlines() == ["1", "0", "2"] or text(look).startswith("1\n")
    assert "start < merged[-1][1]" in text(view) and "start <= merged[-1][1]" in text(edit)
    assert text(wrong) == f"Error: old stands 0 times in {package}/intervals.py; it must stand there exactly once"
    assert (reward.value, reward.reason, reward.masked) == (1.0, "resolved", False)
    assert reward.details["calls"] == 4 and reward.details["failed_calls"] == 1
    assert env.summary() == "boxes of bubblewrap: 1 patches tested, 1 resolved; 0 episodes masked"


def test_an_answer_without_a_call_submits_what_is_there(shipped):
    row = shipped[1]["slugs"]
    assert play(agent(shipped), row, apply(row), "It is mended.")[-1].value == 1.0
    nothing = play(agent(shipped), row, "There is nothing to mend.")[-1]
    assert (nothing.value, nothing.reason, nothing.masked) == (0.0, "nothing was changed", False)


def test_an_agent_that_breaks_something_else_is_not_rewarded(shipped):
    row = shipped[1]["cache"]
    broken = play(agent(shipped), row, apply(row), shell("echo 'Cache.put = None' >> */cache.py"), SUBMIT)[-1]
    assert (broken.value, broken.masked, broken.details["tests_wrong"]) == (0.0, False, 3)
    partly = play(agent(shipped), row, shell("echo '# see the issue' >> */cache.py"), SUBMIT)[-1]
    assert partly.value == 0.0 and partly.details["tests_wrong"] == 1 and "test_reading_renews" in partly.reason


def test_what_an_agent_does_to_hidden_tests_and_to_git_does_not_count(shipped):
    row = shipped[1]["durations"]
    cheat = """
rm tests/test_durations.py && echo 'import unittest' > tests/test_durations.py
git add -A && git -c user.name=a -c user.email=a@b commit -qm 'All is well'
git config core.fsmonitor 'touch /testbed/escaped' && git config diff.external 'echo nothing'
printf '#!/bin/sh\\ntouch /testbed/escaped' > .git/hooks/post-index-change && chmod 755 .git/hooks/*
"""
    reward = play(agent(shipped), row, shell(cheat), SUBMIT)[-1]
    assert (reward.value, reward.reason) == (0.0, "nothing was changed")
    both = play(agent(shipped), row, apply(row), shell(cheat), shell("rm -rf .git && ln -s /etc .git"), SUBMIT)[-1]
    assert (both.value, both.reason) == (1.0, "resolved")


def test_what_an_agent_puts_where_hidden_tests_go_is_its_own_fault(shipped):
    new = "diff --git a/{0} b/{0}\nnew file mode 100644\n--- /dev/null\n+++ b/{0}\n@@ -0,0 +1 @@\n+# new\n"
    empty = "diff --git a/more/__init__.py b/more/__init__.py\nnew file mode 100644\nindex 0000000..e69de29\n"
    row = shipped[1]["slugs"]
    row = {**row, "test_patch": (row.get("test_patch") or "") + empty + new.format("more/test_more.py")}
    same = shell("mkdir more && echo '# mine' > more/__init__.py && echo '# mine' > more/test_more.py")
    both = play(agent(shipped), row, apply(row), same, SUBMIT)[-1]
    assert (both.value, both.reason) == (1.0, "resolved")
    for way in ("echo > more", "ln -s tests more"):
        reward = play(agent(shipped), row, apply(row), shell(way), SUBMIT)[-1]
        assert (reward.value, reward.masked) == (0.0, False) and reward.reason.startswith("the patch does not apply")


def test_an_episode_that_finds_no_folder_gives_its_room_back(shipped, monkeypatch):
    async def episodes():
        env = agent(shipped, at_once=1)
        with monkeypatch.context() as full:
            full.setattr("tempfile.tempdir", "/nonexistent")
            with pytest.raises(OSError, match="nonexistent"):
                await env.open(shipped[1]["slugs"])
        async with asyncio.timeout(20.0):
            session = await env.open(shipped[1]["slugs"])
        await session.close()
        await env.close()

    asyncio.run(episodes())


def test_a_folder_that_an_agent_closes_is_no_fault_of_the_box(shipped):
    reward = play(agent(shipped), shipped[1]["slugs"], shell("chmod 000 ."), shell("chmod 000 tests"), SUBMIT)[-1]
    assert (reward.value, reward.masked) == (0.0, False)


def test_time_limits_mask(shipped):
    row = shipped[1]["intervals"]
    slow, reward = play(agent(shipped, command_s=0.5), row, shell("sleep 100"), cut="time")
    assert text(slow) == "[the command was ended after 0.5 s]"
    assert (reward.value, reward.reason, reward.masked) == (0.0, "the agent's time is up", True)
    endless = shell("printf 'while True: pass' > */intervals.py")
    reward = play(agent(shipped, tests_s=1.0), row, endless, SUBMIT)[-1]
    assert (reward.value, reward.reason, reward.masked) == (0.0, "the tests' time is up", True)


@pytest.mark.parametrize("limit", ["turns", "tokens", "context"])
def test_a_limit_masks_what_is_resolved_and_scores_what_is_not(shipped, limit):
    row = shipped[1]["slugs"]
    reward = play(agent(shipped), row, apply(row), cut=limit)[-1]
    assert reward.masked and reward.reason == f"resolved, but the agent reached its limit of {limit}"
    if limit == "turns":
        reward = play(agent(shipped), row, cut=limit)[-1]
        assert (reward.value, reward.masked, reward.reason) == (0.0, False, "limit of turns; nothing was changed")


def test_tests_that_are_killed_mask(shipped):
    row = shipped[1]["slugs"]
    reward = play(agent(shipped), row, shell("echo 'import os; os.kill(os.getpid(), 9)' >> */slugs.py"), SUBMIT)[-1]
    assert (reward.reason, reward.masked) == ("the tests ran out of memory", True)


def test_commands_stay_in_their_box(shipped, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    commands = [
        f"cat {secret}",
        f"cat {shipped[0]}/*/README.md",
        "cat /etc/passwd",
        "touch /usr/escaped",
        "ls /proc/1",
        "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 22), 1)'",
        "unshare -U true",
        "mount -t tmpfs none /tmp",
        "kill -9 1; sleep 0.2; false",
        "env | grep -v -e ^PWD -e ^HOME -e ^TMPDIR -e ^PATH -e ^LC_ALL -e ^SHLVL -e ^_=; false",
        "ulimit -u 999999",
        "head -c 300M /dev/zero > /tmp/large",
    ]
    shown = play(agent(shipped), shipped[1]["slugs"], *map(shell, commands))
    assert all("[exit status" in text(each) for each in shown), [text(each) for each in shown]
    assert not any("secret" in text(each).replace(str(secret), "") for each in shown)
    assert text(shown[9]) == "[exit status 1]"


def test_calls_that_are_wrong_are_answered(shipped):
    wrong = [
        "<tool_call>nothing</tool_call>",
        call("fly"),
        call("shell"),
        call("edit", action="fly", path="README.md"),
        call("edit", action="view", path="/etc/passwd"),
        call("edit", action="insert", path="README.md", line=99, text="x"),
    ]
    *shown, nul = play(agent(shipped), shipped[1]["slugs"], *wrong, shell("echo \0"))
    assert all("Error: " in text(each) for each in shown)
    assert text(nul) == "bash: embedded null byte\n[exit status 127]"


def test_an_episode_that_is_cancelled_leaves_nothing(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    for path in tmp_path.parents[:3]:
        path.chmod(path.stat().st_mode | 0o011)

    async def cancelled():
        env = agent(shipped, command_s=2.0)
        session = await env.open(shipped[1]["slugs"])
        task = asyncio.create_task(session.step(shell("sleep 100")))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await session.close()
        await env.close()

    asyncio.run(cancelled())
    assert not os.listdir(tmp_path)


R2E = {
    "docker_image": "r2e/pkg:1",
    "problem_statement": "Mend it.",
    "commit_hash": "abc",
    "execution_result_content": json.dumps({"test_file_names": ["test_1.py"], "test_file_codes": ["import unittest"]}),
    "expected_output_json": json.dumps({"TestA.test_one": "PASSED", "TestA.test_two": "FAILED"}),
}
BENCH = {
    "instance_id": "a__b-1",
    "repo": "a/b",
    "base_commit": "abc",
    "problem_statement": "Mend it.",
    "test_patch": "--- a/tests/test_x.py\n+++ b/tests/test_x.py\n@@ -1 +1 @@\n-a\n+b\n",
    "FAIL_TO_PASS": '["tests/test_x.py::test_a"]',
    "PASS_TO_PASS": ["tests/test_x.py::test_b[1 - 2]"],
}


def test_rows_of_both_forms_are_read():
    task = read_task(BENCH)
    assert task.test_command == "python -m pytest -rA -p no:cacheprovider tests/test_x.py"
    assert task.hidden == ["tests/test_x.py"]
    assert task.expected == dict.fromkeys(["tests/test_x.py::test_a", "tests/test_x.py::test_b[1 - 2]"], "passed")
    task = read_task(R2E)
    assert task.test_files == {"r2e_tests/test_1.py": "import unittest"}
    assert task.expected == {"TestA.test_one": "passed", "TestA.test_two": "failed"}


@pytest.mark.parametrize(
    ("row", "change", "problem"),
    [
        (BENCH, {"problem_statement": " "}, "no problem_statement"),
        (BENCH, {"base_commit": None}, "no base_commit; a row is either like SWE-bench's or has execution_result"),
        (BENCH, {"FAIL_TO_PASS": "[]"}, "FAIL_TO_PASS that is no list of at least one test"),
        (BENCH, {"FAIL_TO_PASS": "test"}, "FAIL_TO_PASS that is no list of at least one test"),
        (BENCH, {"test_patch": ["a"]}, "test_patch that is no text"),
        (BENCH, {"test_format": "nose"}, "test_format 'nose'; it must be pytest or unittest or r2e"),
        (R2E, {"expected_output_json": None}, "no expected_output_json, which must be an object or one as JSON"),
        (R2E, {"expected_output_json": "{}"}, "no test whose outcome decides"),
        (R2E, {"execution_result_content": "{}"}, "execution_result_content without test_file_names"),
    ],
)
def test_a_row_that_is_wrong_is_refused(row, change, problem):
    with pytest.raises(SweRowError, match=problem.replace("[", r"\[")):
        read_task({**row, **change})


def test_hidden_files_are_all_that_a_test_patch_touches_and_the_tests_are_those_it_leaves():
    patch = (
        "diff --git a/t/__init__.py b/t/__init__.py\nnew file mode 100644\nindex 0000000..e69de29\n"
        "diff --git a/t/old.py b/t/old.py\ndeleted file mode 100644\n--- a/t/old.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n"
        "diff --git a/t/data b/t/data\nindex 1..2 100644\nGIT binary patch\n"
        "diff --git a/t/a.py b/t/b.py\nsimilarity index 100%\nrename from t/a.py\nrename to t/b.py\n"
        "diff --git a/t/a b.py b/t/a b.py\n--- a/t/a b.py\n+++ b/t/a b.py\n@@ -1 +1 @@\n-a\n+b\n"
    )
    task = read_task({**BENCH, "test_patch": patch})
    assert task.hidden == ["t/__init__.py", "t/a b.py", "t/a.py", "t/b.py", "t/data", "t/old.py"]
    assert task.test_command == "python -m pytest -rA -p no:cacheprovider t/b.py 't/a b.py'"


def test_tests_are_named_as_rows_of_swe_bench_name_them():
    report = (
        "PASSED t.py::test_a[x - y]\nPASSED t.py::test_b[(A, B)]\nPASSED t.py::test_b[(A, C)]\nXFAIL t.py::test_c - no"
    )
    found = read_outcomes(report, "pytest")
    names = ["t.py::test_a[x - y]", "t.py::test_b[(A,", "t.py::test_c"]
    assert wrong_tests(found, dict.fromkeys(names, "passed"), "pytest") == []
    found = read_outcomes(report + "\nFAILED t.py::test_b[(A, D)] - no\nXPASS t.py::test_c - no", "pytest")
    assert wrong_tests(found, dict.fromkeys(names, "passed"), "pytest") == names[1:]
    assert wrong_tests({"A.c": "xfail"}, {"A.c": "passed"}, "r2e") == ["A.c"]
    found = read_outcomes("test_a (t.Case)\nURLs are reversible. ... ok\ntest_b (t.Case) ... ok\n", "unittest")
    expected = dict.fromkeys(["URLs are reversible.", "test_a (t.Case)", "test_b (t.Case)"], "passed")
    assert wrong_tests(found, expected, "unittest") == []


def test_reports_are_read_test_by_test():
    report = """
PASSED tests/test_x.py::test_a
PASSED tests/test_x.py::test_b[1 - 2]
FAILED tests/test_x.py::test_c - AssertionError: PASSED tests/test_x.py::test_c
ERROR tests/test_x.py::test_a - twice
"""
    found = read_outcomes(report, "pytest")
    assert found["tests/test_x.py::test_a"] == "error" and found["tests/test_x.py::test_c"] == "failed"
    assert read_outcomes("PASSED r2e_tests/test_1.py::TestA::test_one", "r2e") == {"TestA.test_one": "passed"}
    report = (
        "test_a (t.Case.test_a) ... ok\ntest_b (t.Case)\nSays what. ... FAIL\ntest_c (t.Case.test_c) ... skipped 'x'"
    )
    found = read_outcomes(report, "unittest")
    assert found.pop("Says what.") == "failed"
    assert found == {"test_a (t.Case)": "passed", "test_b (t.Case)": "failed", "test_c (t.Case)": "skipped"}
    expected = dict.fromkeys(["test_a (t.Case.test_a)", "test_b (t.Case)", "test_d (t.Case)"], "passed")
    assert wrong_tests(found, expected, "unittest") == ["test_b (t.Case)", "test_d (t.Case)"]


def test_apptainer_gets_an_image_and_nothing_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/apptainer")
    command = ApptainerWorkspace().command(tmp_path, ["pytest"], Limits(memory_bytes=1 << 30), "docker://r2e/pkg:1")
    assert command[:3] == ["/usr/bin/apptainer", "exec", "--containall"]
    assert command[-4:] == ["--pwd", "/testbed", "docker://r2e/pkg:1", "pytest"]
    assert f"{tmp_path}:/testbed" in command and "none" in command
    assert out_of_memory(Run("exited", 137, b"", b"")) and not out_of_memory(Run("wall", 9, b"", b""))


def test_where_bubblewrap_does_not_work_the_domain_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: no namespaces' >&2\nexit 1")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NoSandboxError, match=r"swe.container bubblewrap on this machine: .*bwrap"):
        environment("swe_agentic", swe=SweAgenticConfig(container="bubblewrap"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs commands as another user, who cannot see all that it can")
def test_where_a_checkout_cannot_be_seen_the_domain_is_refused_at_the_start(shipped, tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(NoSandboxError, match=r"this machine: a folder in .* cannot be shown in a box"):
        agent(shipped)


def test_where_there_is_no_container_the_domain_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NoSandboxError, match=r"swe.container apptainer on this machine: apptainer is not installed"):
        environment("swe_agentic")
