"""The Python tool in every sandbox that can be made here: what the policy is shown, its limits, and the reward."""

import asyncio
import os
import subprocess
import sys
import time

import psutil
import pytest

from millrace.config.schema import PythonToolConfig, SandboxConfig
from millrace.environments.base import Observation, Reward, TurnEnvironment
from millrace.environments.math import MathEnvironment
from millrace.environments.python_tool import LOST, NAME, PythonToolEnvironment
from millrace.environments.sandbox.boxes import Unavailable
from millrace.environments.sandbox.interpreter import Interpreter, SessionLauncher
from millrace.environments.sandbox.run import Limits, SandboxFault
from millrace.environments.sandbox.tiers import TIERS, open_tier

ROW = {"prompt": "what is 6 times 7?", "answer": 42}


@pytest.fixture(params=TIERS)
def tier(request):
    try:
        open_tier(request.param).close()
    except Unavailable as error:
        pytest.skip(f"{request.param}: {error}")
    return request.param


def call(code):
    return f"<tool_call>\n<function={NAME}>\n<parameter=code>\n{code}\n</parameter>\n</function>\n</tool_call>"


def converse(answers, *, tier="auto", **config):
    """What the environment says to each answer: the texts of its tool results, or a reward."""
    environment = PythonToolEnvironment(
        PythonToolConfig(**config), SandboxConfig(tier=tier), MathEnvironment(verify_timeout_s=10, workers=1)
    )
    assert isinstance(environment, TurnEnvironment) and environment.validate(ROW) is None

    async def go():
        session = await environment.open(ROW)
        said = []
        try:
            for answer in answers:
                outcome = await session.step(answer)
                said.append(outcome if isinstance(outcome, Reward) else texts(outcome))
        finally:
            await session.close()
            await environment.close()
        return said

    return asyncio.run(go())


def texts(observation: Observation):
    assert {message["role"] for message in observation.messages} == {"tool"}
    return [message["content"] for message in observation.messages]


def test_state_is_kept_from_call_to_call_and_the_final_answer_is_judged(tier):
    said = converse([call("x = 6\nprint('six')"), call("x * 7"), "so \\boxed{42}"], tier=tier)
    assert said[:2] == [["six"], ["42"]]
    assert said[2].value == 1.0 and said[2].reason == "correct"
    assert (said[2].details["calls"], said[2].details["failed_calls"], said[2].details[f"sandbox_{tier}"]) == (2, 0, 1)


def test_an_error_is_shown_with_its_line_and_keeps_the_state(tier):
    said = converse([call("x = 1\ny = x / 0"), call("x"), call("if x"), call("import sys; sys.exit(3)")], tier=tier)
    (error,), kept, (syntax,), left = said
    assert error.endswith("ZeroDivisionError: division by zero") and "line 2" in error and "y = x / 0" in error
    assert kept == ["1"] and left == ["SystemExit: 3"]
    assert syntax.splitlines()[-1].startswith("SyntaxError") and "session" not in error and "ast.py" not in syntax


def test_a_call_that_never_ends_is_stopped_and_the_lost_state_is_told(tier):
    began = time.monotonic()
    said = converse(
        [call("x = 1"), call("print('begun', flush=True)\nwhile True: pass"), call("x")], tier=tier, call_s=0.5
    )
    assert said[1] == [f"begun\nThe call was stopped after 0.5 s. {LOST}"]
    assert said[2][0].endswith("NameError: name 'x' is not defined")
    assert time.monotonic() - began < 60


def test_what_prints_without_end_is_stopped_and_long_output_is_cut_with_a_note(tier):
    said = converse([call("while True: print('a' * 1000)"), call("print('b' * 50_000)")], tier=tier)
    assert said[0][0].endswith(f"The call was stopped, for it printed too much. {LOST}")
    assert said[1] == ["b" * 4000 + "\n[... 42000 characters left out ...]\n" + "b" * 4000]


def test_an_interpreter_that_ends_itself_says_so_and_the_next_call_has_a_new_one(tier):
    said = converse([call("import os; os._exit(0)"), call("1 + 1"), call("print(end='')")], tier=tier)
    assert said == [[f"The interpreter ended by itself. {LOST}"], ["2"], ["[no output]"]]


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd').read()",
        "open('x', 'w').write('x')",
        "import socket; socket.socket()",
        "import os; os.fork()",
        "import os; os.kill(1, 9)",
        "import subprocess; subprocess.run(['ls'])",
        "x = bytearray(3 << 30)",
        "import os; assert not {name for name in os.environ} - {'PYTHONHASHSEED', 'LC_ALL', 'PWD'}; 1 / 0",
    ],
)
def test_what_the_sandbox_keeps_from_code_is_an_error_in_the_policys_text(tier, code):
    ((text,),) = converse([call(code)], tier=tier)
    assert "Traceback" in text and text.splitlines()[-1].split(":")[0].endswith("Error")


def test_the_limits_of_all_calls_are_told():
    said = converse([call("1"), call("2") + call("3")], calls=2)
    assert said == [["1"], ["2", "Error: all 2 calls are used up; give the final answer"]]
    spent = converse([call("import time; time.sleep(0.3)"), call("1")], all_calls_s=0.25)
    assert spent[1] == ["Error: the 0.25 s of all calls are used up; give the final answer"]


@pytest.mark.parametrize(("by", "masked"), [("turns", False), ("tokens", False), ("context", False), ("time", True)])
def test_an_episode_that_a_limit_cuts_has_no_answer_and_time_alone_is_no_fault_of_it(by, masked):
    environment = PythonToolEnvironment(
        PythonToolConfig(), SandboxConfig(), MathEnvironment(verify_timeout_s=10, workers=1)
    )

    async def cut():
        session = await environment.open(ROW)
        return await session.cut(by)

    reward = asyncio.run(cut())
    assert (reward.value, reward.masked) == (0.0, masked)
    assert reward.reason == f"no final answer within the limit of {by}"


def test_calls_that_cannot_be_carried_out_are_answered_in_words():
    said = converse(
        [
            "<tool_call>{'name'}</tool_call>",
            '<tool_call>{"name": "search", "arguments": {}}</tool_call>',
            f'<tool_call>{{"name": "{NAME}", "arguments": {{"source": "1"}}}}</tool_call>',
        ]
    )
    assert said[0][0].startswith("Error: the tool call is not valid JSON")
    assert said[1] == [f"Error: there is no tool search; the only one is {NAME}"]
    assert said[2] == [f"Error: {NAME} needs the parameter code, a string"]


def test_an_interpreter_that_cannot_be_started_leaves_no_descriptor(monkeypatch):
    launcher = SessionLauncher("zygote")
    monkeypatch.setattr(sys, "_base_executable", "/nonexistent/python")

    async def go():
        interpreters = [Interpreter(launcher, Limits()) for _ in range(3)]
        before = len(os.listdir("/proc/self/fd"))
        for each in interpreters:
            with pytest.raises(SandboxFault, match=r"zygote: .*No such file"):
                await each.call("1", 5)
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(go())


def test_nothing_is_left_of_a_session_that_is_closed_in_the_middle_of_a_call(tier):
    async def go():
        interpreter = Interpreter(SessionLauncher(tier), Limits())
        await interpreter.call("1", 10)
        process = interpreter._process
        running = asyncio.ensure_future(interpreter.call("while True: pass", 60))
        await asyncio.sleep(0.2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        interpreter.close()
        return process

    process = asyncio.run(go())
    assert process.returncode is not None


HOLDER = """
import asyncio, sys
from millrace.environments.sandbox.interpreter import Interpreter, Limits, SessionLauncher

async def hold():
    interpreter = Interpreter(SessionLauncher(sys.argv[1]), Limits())
    await interpreter.call("1", 10)
    print(interpreter._process.pid, flush=True)
    await interpreter.call("while True: pass", 100)

asyncio.run(hold())
"""


def test_a_session_ends_with_the_process_that_holds_it_however_that_ends(tier):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tier], stdout=subprocess.PIPE, text=True)
    session = psutil.Process(int(holder.stdout.readline()))
    tree = [session, *session.children(recursive=True)]
    holder.kill()
    holder.communicate()
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_many_sessions_run_beside_each_other():
    environment = PythonToolEnvironment(
        PythonToolConfig(), SandboxConfig(workers=2), MathEnvironment(verify_timeout_s=10, workers=1)
    )

    async def one(number):
        session = await environment.open(ROW)
        try:
            await session.step(call(f"x = {number}"))
            return texts(await session.step(call("x")))
        finally:
            await session.close()

    async def go():
        return await asyncio.gather(*(one(number) for number in range(20)))

    assert asyncio.run(go()) == [[str(number)] for number in range(20)]
    assert environment.calls == 40 and environment.lost == 0
