import asyncio
import base64
import json
import pickle
import zlib

import pytest
from environment_runs import environment, score

from millrace.config.schema import SandboxConfig
from millrace.environments.base import ReportingEnvironment
from millrace.environments.code import last_program
from millrace.environments.code_rows import CodeRowError, opening, read_problem
from millrace.environments.gym_rows import plain_row
from millrace.environments.sandbox.compare import NotOneValueError, read_value, same_text, same_value
from millrace.environments.sandbox.service import Case
from millrace.environments.sandbox.tiers import NoSandboxError, choose_tier

STREAMS = {"prompt": "Add two numbers.", "tests": [{"input": f"{n} 1\n", "output": f"{n + 1}\n"} for n in range(4)]}
CALLS = {"prompt": "Add.", "function": "add", "tests": [{"input": [n, 1], "output": n + 1} for n in range(4)]}
ADD = "print(sum(map(int, input().split())))"
HALF = "a, b = map(int, input().split())\nprint(a + b if a < 2 else 0)"


@pytest.fixture(scope="module", autouse=True)
def some_tier():
    try:
        choose_tier("auto")
    except NoSandboxError as error:
        pytest.skip(str(error))


def block(code, language="python"):
    return f"Here it is:\n```{language}\n{code}\n```\nDone."


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def live(tests, private, **metadata):
    row = {"question_content": "Add.", "public_test_cases": json.dumps(tests), "private_test_cases": private}
    return {**row, "metadata": json.dumps(metadata)}


def test_answers_are_rewarded_by_all_tests():
    found = score(
        environment("code"),
        (STREAMS, block(ADD)),
        (STREAMS, f"<think>{block('print(0)')}</think>{block(ADD)}"),
        (STREAMS, block(HALF)),
        (STREAMS, block("print(")),
        (STREAMS, ADD),
        (STREAMS, f"<think>{block(ADD)}"),
        (CALLS, block("def add(a, b): return a + b")),
        (CALLS, block("def add(a, b): return float(a + b)")),
    )
    assert [reward.value for reward in found] == [1, 1, 0, 0, 0, 0, 1, 0]
    assert found[7].reason == "test 1: wrong value 1.0, not 1"
    assert [reward.reason for reward in found[2:6]] == [
        "test 3: wrong output '0', not '3'",
        "test 1: exit status 1 (SyntaxError: '(' was never closed)",
        "no program in a fenced block",
        "no program in a fenced block",
    ]
    assert all(sum(name.startswith("sandbox_") for name in reward.details) for reward in found)
    assert (found[2].details["tests_passed"], found[2].details["tests_run"], found[2].details["tests"]) == (2, 3, 4)


def test_an_answer_that_the_sandbox_can_give_no_verdict_on_is_masked(monkeypatch):
    monkeypatch.setattr("millrace.environments.sandbox.places.CHECK", "os:abort")
    (found,) = score(environment("code"), (STREAMS, block(ADD)))
    assert found.masked and found.value == 0 and found.reason.startswith("no verdict: a program could not be tested")


def test_the_fraction_counts_every_test():
    env = environment("code", grading="fraction")
    found = score(env, (STREAMS, block(ADD)), (STREAMS, block(HALF)), (STREAMS, block("print('x')")))
    assert [reward.value for reward in found] == [1, 0.5, 0]
    assert isinstance(env, ReportingEnvironment)
    assert "3 programs, 12 tests, 1 programs passed all; 0 faults" in env.summary()


def test_a_row_has_limits_of_its_own():
    slow = block("import time\ntime.sleep(1.5)\n" + ADD)
    large = block("x = bytearray(200 << 20)\n" + ADD)
    found = score(
        environment("code"),
        ({**STREAMS, "tests": STREAMS["tests"][:1], "time_limit_s": 0.1}, slow),
        ({**STREAMS, "tests": STREAMS["tests"][:1]}, large),
        ({**STREAMS, "tests": STREAMS["tests"][:1], "memory_limit_mb": 100}, large),
        ({**STREAMS, "tests": STREAMS["tests"][:1], "tolerance": 1e-6}, block("print(1.0000001)")),
    )
    assert [reward.value for reward in found] == [0, 1, 0, 1]
    assert found[0].reason == "test 1: time limit" and "MemoryError" in found[2].reason


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```\n```py\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```Python\na\n```\n```text\noutput\n```", "a\n"),
        ("```cpp\nint main() {}\n```", None),
        ("```python\n\n```", None),
        ("```python\na", None),
        ("say ```python a```", None),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        pytest.param("```python\n" * 20_000, None, id="opens blocks without end"),
        pytest.param("```python\n" * 20_000 + "a\n```", "```python\n" * 19_999 + "a\n", id="closes the first of many"),
    ],
)
def test_the_program_is_the_last_block_of_python(text, program):
    assert last_program(text, ["python"]) == (None if program is None else (program, "python"))


@pytest.mark.parametrize(
    ("text", "languages", "found"),
    [
        ("```python\na\n```\n```cpp\nb\n```", ["python", "cpp"], ("b\n", "cpp")),
        ("```python\na\n```\n```cpp\nb\n```", ["python"], ("a\n", "python")),
        ("```python\na\n```\n```C++\nb\n```", ["cpp"], ("b\n", "cpp")),
        ("```python\na\n```", ["cpp"], None),
        ("```\na\n```", ["cpp", "python"], ("a\n", "cpp")),
    ],
)
def test_the_program_is_in_a_language_that_is_allowed(text, languages, found):
    assert last_program(text, languages) == found


CPP_ADD = '#include <cstdio>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d", a + b); }'


def test_programs_in_two_languages_are_rewarded():
    env = environment("code", sandbox=SandboxConfig(languages=("python", "cpp")))
    assert env.validate({**STREAMS, "language": "cpp"}) is None
    assert "its language is 'rust', and sandbox.languages allows python, cpp" in env.validate(
        {**STREAMS, "language": "rust"}
    )
    assert "its function is called in Python" in env.validate({**CALLS, "language": "cpp"})
    found = score(
        env,
        (STREAMS, block(CPP_ADD, "cpp")),
        (STREAMS, block(ADD)),
        ({**STREAMS, "language": "python"}, block(CPP_ADD, "cpp")),
        (CALLS, block(CPP_ADD, "c++")),
        (STREAMS, block(CPP_ADD.replace("a + b", "a - b"), "cpp")),
        (STREAMS, block("int main() { return 3 }", "cpp")),
    )
    assert [reward.value for reward in found] == [1, 1, 0, 0, 0, 0]
    assert [reward.reason for reward in found[2:]] == [
        "no program in a fenced block",
        "no program in a fenced block",
        "test 1: wrong output '-1', not '1'",
        "does not compile (main.cpp:1:22: error: expected ';' before '}' token)",
    ]


def test_the_problem_is_posed_in_the_languages_that_are_allowed():
    question = {"question": "Add."}
    assert "Write a Python or C++ program" in opening(question, None, ["python", "cpp"])[0]["content"]
    assert "in one ```cpp block" in opening(question, None, ["cpp"])[0]["content"]


def test_several_tests_in_one_process_give_the_verdicts_of_one_process_each():
    env = environment("code", sandbox=SandboxConfig(tests_per_process=3))
    many = {**STREAMS, "tests": [{"input": f"{n} 1\n", "output": f"{n + 1}\n"} for n in range(9)]}
    calls = {**CALLS, "tests": [{"input": [n, 1], "output": n + 1} for n in range(9)]}
    counting = "import sys\nsys.n = getattr(sys, 'n', 0) + 1\nprint(sum(map(int, input().split())) if sys.n < 2 else 0)"
    found = score(
        env,
        (many, block(ADD)),
        (many, block(ADD.replace("print(", "import os\nos.write(1, b'%d' % ") + "\nos._exit(0)")),
        (many, block("import threading\nthreading.Thread(target=lambda: " + ADD + ").start()")),
        (many, block(counting)),
        (many, block("a, b = map(int, input().split())\nprint(a + b if a < 5 else 0)")),
        (many, block("a, b = map(int, input().split())\nprint(a + b if a < 5 else 1 / 0)")),
        (calls, block("def add(a, b):\n    print('talks')\n    return a + b")),
        (calls, block("def add(a, b): return a + b if a != 7 else 0")),
    )
    assert [reward.value for reward in found] == [1, 1, 1, 1, 0, 0, 1, 0]
    assert [found[place].reason for place in (4, 5, 7)] == [
        "test 6: wrong output '0', not '6'",
        "test 6: exit status 1 (ZeroDivisionError: division by zero)",
        "test 8: wrong value 0, not 8",
    ]
    assert [(found[place].details["tests_passed"], found[place].details["tests_run"]) for place in (4, 7)] == [
        (5, 6),
        (7, 8),
    ]


APPS = {"question": "Add.", "input_output": json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})}
APPS_CALL = {"input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]})}
GYM = {
    "responses_create_params": {"input": "Add."},
    "verifier_metadata": {"unit_tests": {"inputs": ["1 2\n"], "outputs": ["3\n"], "fn_name": None}},
}
STREAM_TESTS = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CALL_TESTS = [{"input": '[1, 2]\n"a"', "output": "3", "testtype": "functional"}]


@pytest.mark.parametrize(
    ("row", "cases", "function"),
    [
        (APPS, [Case("1 2\n", "3\n"), Case("3 4\n", "7\n")], None),
        (APPS_CALL, [Case("[1, 2]", 3), Case("[3, 4]", 7)], "add"),
        (plain_row(GYM), [Case("1 2\n", "3\n")], None),
        (live(STREAM_TESTS, packed(STREAM_TESTS)), [Case("1 2\n", "3\n")] * 2, None),
        (live(CALL_TESTS, json.dumps(CALL_TESTS), func_name="add"), [Case('[[1, 2], "a"]', 3)] * 2, "add"),
    ],
)
def test_rows_of_the_fields_formats_are_read(row, cases, function):
    problem = read_problem(row)
    assert (list(problem.cases), problem.function) == (cases, function)


class Call:
    def __reduce__(self):
        return (print, ("called",))


DAMAGED = base64.b64encode(zlib.compress(b"N\x98\xce.")).decode()
EVIL = base64.b64encode(zlib.compress(pickle.dumps(Call()))).decode()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "x"}, "no tests: give tests, input_output"),
        ({"tests": []}, "an empty list of tests, which every program would pass"),
        ({"tests": [{"input": "", "output": "\n"}]}, "tests that all expect no output"),
        ({"tests": [{"input": 1, "output": "1"}]}, "input and output are not both text"),
        ({"tests": [{"input": "\ud800", "output": "1"}]}, "a test whose input or output no program can be given"),
        ({"tests": [{"input": [1], "output": [float("nan")]}], "function": "f"}, "that expects NaN or Infinity"),
        ({"tests": [{"input": 1, "output": "1"}], "function": "f"}, "whose input is no list of arguments"),
        ({"tests": [{"input": [], "output": 1}], "function": "f()"}, "function 'f()', which is no name"),
        ({"tests": ["x"]}, "tests that are no list of objects"),
        ({"input_output": "{"}, "input_output that is not one JSON value"),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "no lists inputs and outputs of one length"),
        (live([], "!!"), "private_test_cases that is neither JSON nor packed text"),
        (live([], DAMAGED), r"neither JSON nor packed text"),
        (live([], EVIL), r"neither JSON nor packed text \(it asks for builtins.print\)"),
        (live(CALL_TESTS, "[]"), "tests of types .'functional'., and None as metadata.func_name"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, problem, capsys):
    with pytest.raises(CodeRowError, match=problem.replace("f()", r"f\(\)")):
        read_problem(row)
    assert not capsys.readouterr().out


def test_a_row_is_validated_when_its_file_is_opened():
    env = environment("code")
    assert env.validate(STREAMS) is None and env.validate(APPS) is None
    assert env.validate({"prompt": "x"}).startswith("the row has no tests: give tests")
    assert env.validate({**STREAMS, "prompt": None}) == (
        "a row needs prompt, or the problem's text in question or question_content"
    )
    assert env.validate({**STREAMS, "memory_limit_mb": 9999}).startswith("memory_limit_mb must be a number above 0")
    assert env.validate({**STREAMS, "memory_limit_mb": 16}) == "memory_limit_mb is 16, and an interpreter needs 64"
    assert env.validate({**STREAMS, "time_limit_s": True}).startswith("time_limit_s must be a number")
    asyncio.run(env.close())


def test_a_problem_without_a_prompt_is_asked_for_in_the_form_that_is_judged():
    (message,) = opening({"question": " Add. ", "starter_code": ""}, None)
    assert message["content"].startswith("Add.\n\nWrite a Python program that reads standard input")
    (message,) = opening({"question_content": "Add.", "starter_code": "def add(a, b):"}, "add")
    assert "```python\ndef add(a, b):\n```" in message["content"] and "function add that" in message["content"]


@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "same"),
    [
        ("3\n", "3", None, True),
        ("3  \r\n\n\n", "3\n", None, True),
        ("a\n\nb", "a\n\nb\n", None, True),
        ("3\n4", "3 4", None, False),
        (" 3", "3", None, False),
        ("3.0", "3", None, False),
        ("", "3", None, False),
        ("3.0000001 x", "3 x", 1e-6, True),
        ("1000001", "1000000", 1e-5, True),
        ("3.1", "3", 1e-6, False),
        ("nan", "3", 1.0, False),
        ("inf", "3", 1.0, False),
        ("1_0", "10", 1e-6, False),
        ("-1.e1", "-10", 1e-6, True),
        pytest.param("1" * 1_000_000 + "x", "1.5", 1e-6, False, id="nearly a long number"),
        ("10 nan", "10.0 nan", 1e-6, True),
        ("3 4", "3", 1e-6, False),
        ("yes", "no", 1e-6, False),
    ],
)
def test_text_is_compared_line_by_line(given, expected, tolerance, same):
    assert same_text(given, expected, tolerance) is same


@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "same"),
    [
        ("3", 3, None, True),
        ("3.0", 3, None, False),
        ("3", 3.0, None, False),
        ("true", 1, None, False),
        ("null", None, None, True),
        ("null", False, None, False),
        ('"3"', 3, None, False),
        ("[1, [2, 3.0]]", [1, [2, 3.0]], None, True),
        ("[1, 2]", [1, 2, 3], None, False),
        ('{"b": 1, "a": [true]}', {"a": [True], "b": 1}, None, True),
        ('{"b": 1}', {"a": 1}, None, False),
        ("0.30000000000000004", 0.3, None, False),
        ("[0.30000000000000004]", [0.3], 1e-9, True),
        ("1e999", 1e308, 1.0, False),
        pytest.param(str(10**4299), 10**4299, None, True, id="long integer"),
        pytest.param("[" * 900 + "1" + "]" * 900, json.loads("[" * 900 + "1" + "]" * 900), None, True, id="deep"),
        pytest.param("[" * 900 + "2" + "]" * 900, json.loads("[" * 900 + "1" + "]" * 900), None, False, id="deeper"),
    ],
)
def test_values_are_compared_with_their_types(given, expected, tolerance, same):
    assert same_value(read_value(given), expected, tolerance) is same


@pytest.mark.parametrize(
    "text", ["", "1 2", "NaN", "-Infinity", "{'a': 1}", '{"a": 1, "a": 2}', "9" * 5000, "[" * 10**5]
)
def test_what_is_not_one_value_is_none(text):
    with pytest.raises(NotOneValueError):
        read_value(text)
