import asyncio
import json
import re

import pytest
from judge_server import Said, judge_server

from millrace.config.schema import JudgeConfig
from millrace.environments.judge import HttpEndpoint, Judge
from millrace.environments.swe_agentless import SweAgentlessEnvironment, diff_of, parse_score

CODE = "def area(width, height):\n    return width + height\n"
GOLDEN = """\
diff --git a/shapes.py b/shapes.py
--- a/shapes.py
+++ b/shapes.py
@@ -1,2 +1,2 @@
 def area(width, height):
-    return width + height
+    return width * height
"""
ROW = {
    "instance_id": "shapes-1",
    "golden_patch": GOLDEN,
    "relevant_file_contents": {"shapes.py": CODE, "tests.py": "from shapes import area\n"},
    "original_prompt": "The area of a rectangle of 2 by 3 comes out as 5.",
    "source": "made-up",
}


def repair(new, old="    return width + height"):
    return f"<think>hm</think>\n### shapes.py\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE"


def environment(url, **options):
    config = JudgeConfig(url=url, timeout_s=2.0, **{"retries": 0, **options})
    return SweAgentlessEnvironment(Judge("j", config, HttpEndpoint(url, None)))


def score(url, answer, row=ROW, **options):
    env = environment(url, **options)

    async def session():
        try:
            return await env.step(row, env.reset(row), answer)
        finally:
            await env.close()

    return asyncio.run(session())


@pytest.mark.parametrize(
    ("answer", "value", "reason", "parsed", "applied"),
    [
        (repair("    return width * height"), 1.0, "as the golden patch", 1.0, 1.0),
        (GOLDEN, 1.0, "as the golden patch", 1.0, 1.0),
        (repair("    return width + height"), 0.0, "nothing was changed", 1.0, 1.0),
        ("I would multiply.", 0.0, "no edit in the answer", 0.0, 0.0),
        (repair("x").replace("</think>", ""), 0.0, "no edit in the answer", 0.0, 0.0),
        (
            repair("x") + repair("\nx").partition("</think>")[2] * 200,
            0.0,
            "more than 200 edits in the answer",
            0.0,
            0.0,
        ),
        (repair("x", old="    return a"), 0.0, "edit 1 does not apply: what it replaces is not in shapes.py", 1.0, 0.0),
    ],
)
def test_clear_cases_are_decided_without_the_judge(answer, value, reason, parsed, applied):
    with judge_server(lambda request: Said("{}")) as server:
        reward = score(server.url, answer)
    assert (reward.value, reward.reason, reward.masked, server.requests) == (value, reason, False, [])
    assert (reward.details["parsed"], reward.details["applied"], reward.details["verdicts"]) == (parsed, applied, 0.0)


def test_another_repair_has_the_judges_score():
    with judge_server(lambda request: Said('It is right {"score": 1}. {"score": 8}')) as server:
        reward = score(server.url, repair("    return height * width"))
    assert (reward.value, reward.reason, reward.masked) == (0.8, "the judge's score is 0.8", False)
    assert reward.details["verdicts"] == 1.0
    (request,) = server.requests
    asked = request["messages"][0]["content"]
    assert ROW["original_prompt"] in asked and "+    return width * height" in asked
    candidate = re.search(r"\[CANDIDATE PATCH \w+\]\n(.*?)\n\[END OF", asked, re.DOTALL).group(1)
    assert candidate.splitlines()[:2] == ["--- a/shapes.py", "+++ b/shapes.py"]
    assert "+    return height * width" in candidate and "SEARCH" not in candidate and "hm" not in candidate


@pytest.mark.parametrize(
    ("said", "outcome"), [(Said(status=503, raw="x"), "failed"), (Said('{"score": 11}'), "unparsable")]
)
def test_a_score_that_cannot_be_had_masks_the_answer_and_is_counted(said, outcome):
    with judge_server(lambda request: said) as server:
        reward = score(server.url, repair("    return height * width"), retries=1)
    assert reward.masked and reward.value == 0.0 and reward.details[outcome] == 1.0
    assert len(server.requests) == 2


def test_a_golden_patch_of_files_that_the_row_lacks_leaves_it_to_the_judge():
    row = {**ROW, "golden_patch": GOLDEN.replace("shapes.py", "other.py")}
    with judge_server(lambda request: Said('{"score": 3}')) as server:
        reward = score(server.url, repair("    return width * height"), row=row)
    assert (reward.value, len(server.requests)) == (0.3, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"score": 10}', 1.0),
        ('{"score": 0}', 0.0),
        ('{"score": 7.5}', 0.75),
        ('{"score": "7"}', None),
        ('{"score": true}', None),
        ('{"score": -1}', None),
        ('{"score": NaN}', None),
        ('<think>{"score": 5}</think>', None),
        ("5", None),
    ],
)
def test_the_last_object_of_the_final_text_is_the_score(text, value):
    assert parse_score(text) == value


def test_the_judge_sees_files_that_come_and_go():
    assert diff_of({"a": "1\n"}, {"b": "2\n"}).splitlines() == [
        "--- a/a",
        "+++ /dev/null",
        "@@ -1,2 +0,0 @@",
        "-1",
        "-",
        "--- /dev/null",
        "+++ b/b",
        "@@ -0,0 +1,2 @@",
        "+2",
        "+",
    ]


def test_the_prompt_is_the_rows_or_made_of_issue_and_files():
    env = environment("http://a/v1")
    (message,) = env.reset(ROW)
    assert ROW["original_prompt"] in message["content"] and f"### shapes.py\n```\n{CODE}" in message["content"]
    assert env.reset({**ROW, "prompt": "Fix it."}) == [{"role": "user", "content": "Fix it."}]


@pytest.mark.parametrize(
    "files",
    [
        ROW["relevant_file_contents"],
        json.dumps(ROW["relevant_file_contents"]),
        [{"path": path, "content": text} for path, text in ROW["relevant_file_contents"].items()],
    ],
)
def test_files_are_read_in_every_form(files):
    row = {**ROW, "relevant_file_contents": files}
    assert environment("http://a/v1").validate(row) is None
    with judge_server(lambda request: Said("{}")) as server:
        assert score(server.url, repair("    return width * height"), row=row).value == 1.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"golden_patch": None}, "golden_patch must be a unified diff, not NoneType"),
        ({"golden_patch": "fix it"}, "golden_patch is no unified diff: no edit in the answer"),
        ({"relevant_file_contents": {}}, "relevant_file_contents is empty"),
        ({"relevant_file_contents": "x"}, "relevant_file_contents is text, but no JSON"),
        ({"relevant_file_contents": ["x"]}, "relevant_file_contents must be the contents of files by their paths"),
        ({"original_prompt": None}, "the row has neither prompt nor original_prompt"),
        ({"prompt": " "}, "prompt is empty"),
        ({"task": "guess"}, "task must be one of repair, localisation, not 'guess'"),
    ],
)
def test_swe_agentless_names_what_is_wrong_with_a_row(changes, sentence):
    assert sentence in environment("http://a/v1").validate({**ROW, **changes})


@pytest.mark.parametrize(
    ("answer", "value", "reason"),
    [
        ("It is the area.\n```\nshapes.py\n```", 1.0, "1 of 1 files found"),
        ("```text\ntests.py\n`./shapes.py`\n```", 1.0, "1 of 1 files found"),
        ("```\na\nb\nc\nd\ne\nshapes.py\n```", 0.0, "0 of 1 files found"),
        ("```\nshapes.py\n```\nor\n```\ntests.py\n```", 0.0, "0 of 1 files found"),
        ("```\nshapes.py\n```\nas in ```area```, and\n```\nnever closed", 1.0, "1 of 1 files found"),
        ("shapes.py", 0.0, "no paths in a fenced block"),
        pytest.param("`" * 200_000, 0.0, "no paths in a fenced block", id="backticks without end"),
    ],
)
def test_localisation_is_the_share_of_the_golden_files_among_those_named(answer, value, reason):
    row = {**ROW, "task": "localisation"}
    reward = score("http://127.0.0.1:9/v1", answer, row=row)
    assert (reward.value, reward.reason, reward.masked) == (value, reason, False)


def test_localisation_asks_with_paths_and_without_contents():
    (message,) = environment("http://a/v1").reset({**ROW, "task": "localisation"})
    assert "shapes.py\ntests.py" in message["content"] and "def area" not in message["content"]
