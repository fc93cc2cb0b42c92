"""Ways to pass tests without solving the task: add two numbers, by a function or on standard streams."""

import json

import pytest
from processes import no_process_left

from millrace.environments.sandbox import check as worker
from millrace.environments.sandbox.run import Limits, Program
from millrace.environments.sandbox.tiers import choose_tier

LIMITS = Limits(wall_s=20.0, cpu_s=5, memory_bytes=512 << 20)
SUMS = [(1, 2), (10, -4), (123456789, 1)]
CALLS = [{"input": json.dumps([a, b]), "expected": a + b} for a, b in SUMS]
STREAMS = [{"input": f"{a} {b}\n", "expected": f"{a + b}\n"} for a, b in SUMS]


@pytest.fixture(scope="module")
def tier():
    """The tier that a recipe would use here: what is tested is outside of the box."""
    with no_process_left():
        name = choose_tier("auto")
        yield name
        worker.close_boxes()


def report(tier, source, tests, function=None, **options):
    program = Program(source, function)._asdict()
    job = {"tier": tier, "program": program, "limits": LIMITS._asdict(), "tests": tests, "every": False}
    return worker.check({**job, "tolerance": None, "compiler": None, "tests_per_process": 1, **options})


def passes(*arguments, **options):
    done = report(*arguments, **options)
    assert done["fault"] is None, done
    return done["failure"] is None and done["passed"] == len(arguments[2])


HONEST_CALLS = [
    "def add(a, b): return a + b",
    "class Solution:\n    def add(self, a, b):\n        print('talks')\n        return a + b",
    "class Solution:\n    def add(self, a: int, b: Optional[int]) -> List[int]:\n        return a + b",
    "def add(a, b): return a + b\nif __name__ == '__main__': print(add(*map(int, input().split())))",
    "add = lambda a, b: a + b\nimport sys\nprint('at import', file=sys.stderr)",
]
HONEST_STREAMS = [
    "import sys\nprint(sum(map(int, input().split())))\nsys.stdout.close()\nsys.stderr = None",
    "print(sum(map(int, input().split())))",
    "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.read().split()))) + '  \\n\\n')",
]


@pytest.mark.parametrize("source", HONEST_CALLS)
def test_an_honest_function_passes(tier, source):
    assert passes(tier, source, CALLS, "add")


@pytest.mark.parametrize("source", HONEST_STREAMS)
def test_an_honest_program_passes(tier, source):
    assert passes(tier, source, STREAMS)


FORGED_CALLS = {
    "wrong": "def add(a, b): return a - b",
    "exit_at_import": "import sys\nsys.exit(0)",
    "hard_exit_at_import": "import os\nos._exit(0)",
    "exit_in_call": "import os\ndef add(a, b): os._exit(0)",
    "exit_handler": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return None",
    "equal_to_all": """
class Equal(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
    def __repr__(self): return "anything"
def add(a, b): return Equal(0)
""",
    "equal_object": "class Equal:\n    def __eq__(self, other): return True\ndef add(a, b): return Equal()",
    "patched_json": "import json\njson.dumps = lambda *a, **k: 'true'\ndef add(a, b): return 1",
    "patched_builtins": """
import builtins
for name in ("print", "all", "any", "len", "isinstance", "type", "bool"):
    setattr(builtins, name, lambda *a, **k: True)
def add(a, b): return 0
""",
    "verdict_text": "def add(a, b): return 'PASS'",
    "verdict_printed": 'def add(a, b):\n    print(\'{"passed": 3, "failure": null}\')\n    return 0',
    "verdict_returned": "def add(a, b): return {'passed': 3, 'ran': 3, 'failure': None, 'faults': 0, 'fault': None}",
    "expected_from_memory": """
import gc, sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        for holder in (frame.f_locals, frame.f_globals):
            for name in ("expected", "output", "tests", "job"):
                if name in holder:
                    return holder[name]
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, dict) and "expected" in thing:
            return thing["expected"]
    return 0
""",
    "patched_supervisor": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("millrace"):
        for function in ("same_value", "same_text", "check", "collect", "send", "run_to_wire"):
            setattr(module, function, lambda *a, **k: True)
def add(a, b): return 0
""",
    "own_source": "def add(a, b): return len(open(__file__).read())",
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef add(a, b): return True",
    "other_descriptors": """
import os
def add(a, b):
    for number in range(3, 64):
        try:
            os.write(number, b'{"ending": "exited", "status": 0}')
        except OSError:
            pass
    return 0
""",
    "true_for_one": "def add(a, b): return a + b == 3",
    "float_for_integer": "def add(a, b): return float(a + b)",
    "text_for_integer": "def add(a, b): return str(a + b)",
    "list_of_one": "def add(a, b): return [a + b]",
    "not_a_number": "def add(a, b): return float('nan')",
    "infinite": "def add(a, b): return float('inf')",
    "two_values": "import os\ndef add(a, b):\n    os.write(3, b'3 ')\n    return a + b",
    "value_then_crash": "import os\ndef add(a, b):\n    os.write(3, str(a + b).encode())\n    os.abort()",
    "value_then_failure": "import os\ndef add(a, b):\n    os.write(3, str(a + b).encode())\n    os._exit(1)",
    "value_then_sleep": "import os, time\ndef add(a, b):\n    os.write(3, str(a + b).encode())\n    time.sleep(100)",
    "only_seen_inputs": "def add(a, b): return {(1, 2): 3}.get((a, b), 0)",
    "memory_of_last_test": "import sys\nsys.n = getattr(sys, 'n', 0) + 3\ndef add(a, b): return sys.n",
    "no_function": "def subtract(a, b): return 0",
    "not_callable": "add = 3",
}


@pytest.mark.parametrize("name", FORGED_CALLS)
def test_no_forged_function_passes(tier, name):
    limits = LIMITS._replace(wall_s=0.5)._asdict() if name == "value_then_sleep" else LIMITS._asdict()
    assert not passes(tier, FORGED_CALLS[name], CALLS, "add", limits=limits)


FORGED_STREAMS = {
    "nothing": "pass",
    "exit_zero": "import os\nos._exit(0)",
    "answer_then_failure": "import sys\nprint(sum(map(int, input().split())))\nsys.exit(1)",
    "answer_then_signal": """
import os
print(sum(map(int, input().split())), flush=True)
os.abort()
""",
    "answer_on_stderr": "import sys\nprint(sum(map(int, input().split())), file=sys.stderr)",
    "all_answers": "print('\\n'.join(map(str, range(100))))",
    "answer_and_more": "print(sum(map(int, input().split())))\nprint('PASS')",
    "not_text": "import os\nos.write(1, b'\\xff\\xfe')",
    "other_form": "print(float(sum(map(int, input().split()))))",
    "null_bytes": "print(str(sum(map(int, input().split()))) + chr(0))",
}


@pytest.mark.parametrize("name", FORGED_STREAMS)
def test_no_forged_program_passes(tier, name):
    assert not passes(tier, FORGED_STREAMS[name], STREAMS)


def test_the_first_failure_ends_a_program_unless_all_are_asked_for(tier):
    source = "a, b = map(int, input().split())\nprint(a + b if a != 10 else 'no')"
    done = report(tier, source, STREAMS)
    assert (done["passed"], done["ran"], done["failure"]) == (1, 2, "test 2: wrong output 'no', not '6'")
    done = report(tier, source, STREAMS, every=True)
    assert (done["passed"], done["ran"], done["failure"]) == (2, 3, "test 2: wrong output 'no', not '6'")


def test_the_reason_says_how_a_program_ended(tier):
    assert report(tier, "1/0", STREAMS)["failure"] == "test 1: exit status 1 (ZeroDivisionError: division by zero)"
    limits = LIMITS._replace(wall_s=0.3)._asdict()
    assert report(tier, "while True: pass", STREAMS, limits=limits)["failure"] == "test 1: time limit"
