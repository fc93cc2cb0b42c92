"""Programs that try to leave their box, against every tier that this machine can make."""

import json
import subprocess
import sys

import pytest
from abuse_programs import ENDLESS, PRELUDE, QUICK

from millrace.environments.sandbox.run import Limits, Program
from millrace.environments.sandbox.single_boxes import OpenBox

LIMITS = Limits(wall_s=20.0, cpu_s=5, memory_bytes=512 << 20)
SHORT = LIMITS._replace(wall_s=0.25)


@pytest.mark.parametrize("name", QUICK)
def test_what_a_program_must_not_do_fails(box, host, name):
    run = box.run(Program(PRELUDE + QUICK[name]), json.dumps(host).encode(), LIMITS)
    assert b"ESCAPED" not in run.stdout, run
    assert run.ending in ("exited", "killed"), run
    if box.name == "zygote":  # the others start afresh each time
        assert alive(box)


HARMLESS = (
    "read_secret",
    "read_passwd",
    "read_own_environment_file",
    "list_sys",
    "fork",
    "shell",
    "connect",
    "abstract_socket",
    "listen",
    "memory_file",
    "trace_me",
    "many_descriptors",
)


@pytest.mark.parametrize("name", HARMLESS)
def test_the_same_programs_succeed_without_a_box(host, name):
    run = OpenBox().run(Program(PRELUDE + QUICK[name]), json.dumps(host).encode(), LIMITS._replace(open_files=1024))
    assert b"ESCAPED" in run.stdout, run


@pytest.mark.parametrize("name", ENDLESS)
def test_a_program_that_does_not_end_is_ended(box, host, name):
    source, endings = ENDLESS[name]
    run = box.run(Program(PRELUDE + source), json.dumps(host).encode(), SHORT)
    assert run.ending in endings and not run.clean, run
    assert len(run.stdout) + len(run.stderr) < 4 * SHORT.output_bytes
    assert alive(box)


def alive(box):
    """Whether the box still gives the next program what it needs."""
    run = box.run(Program("import json\nprint(json.dumps(sum(map(int, input().split()))))"), b"1 2", LIMITS)
    return run.clean and run.stdout == b"3\n"


def test_processor_time_ends_a_program_before_the_wall_does(box):
    run = box.run(Program("while True: pass"), b"", LIMITS._replace(cpu_s=1))
    assert run.ending in ("cpu", "killed", "exited") and not run.clean
    assert run.wall_s < 15


def test_memory_is_limited_and_what_fits_is_given(box):
    assert box.run(Program("x = bytearray(200 << 20)\nprint(len(x))"), b"", LIMITS).stdout == b"209715200\n"
    run = box.run(Program("x = bytearray(600 << 20)"), b"", LIMITS)
    assert run.ending == "exited" and run.status == 1 and b"MemoryError" in run.stderr


def test_output_up_to_the_limit_is_whole(box):
    size = LIMITS.output_bytes
    assert len(box.run(Program(f"print('x' * {size - 1})"), b"", LIMITS).stdout) == size
    assert box.run(Program(f"print('x' * {size})"), b"", LIMITS).ending == "output"


def test_a_scratch_folder_is_limited_in_bytes_and_files_and_gone_afterwards(box):
    if not box.scratch:
        pytest.skip(f"the tier {box.name} gives no scratch folder")
    limits = LIMITS._replace(scratch_bytes=4 << 20, scratch_inodes=100)
    fill = """
import os
made = wrote = 0
try:
    while True:
        open(f"/tmp/{made}", "w").close()
        made += 1
except OSError:
    os.remove("/tmp/0")
try:
    with open("/tmp/big", "wb", buffering=0) as file:
        while True:
            wrote += file.write(bytes(1 << 16))
except OSError:
    print(made, wrote)
"""
    made, wrote = map(int, box.run(Program(fill), b"", limits).stdout.split())
    assert 50 < made <= 100 and 3 << 20 < wrote <= 4 << 20
    assert box.run(Program("import os\nprint(os.listdir('/tmp'), os.getcwd())"), b"", limits).stdout == b"[] /tmp\n"


def test_nothing_of_one_program_reaches_the_next(box):
    poison = """
import builtins, json, os, random, sys
builtins.print = len
builtins.input = lambda: "poisoned"
json.dumps = sys.setrecursionlimit = None
os.environ["POISON"] = "1"
sys.modules["math"] = None
"""
    assert box.run(Program(poison), b"", LIMITS).clean
    run = box.run(Program("import math, os, json\nprint(json.dumps([input(), 'POISON' in os.environ]))"), b"a", LIMITS)
    assert run.stdout == b'["a", false]\n'


def test_a_program_runs_as_in_an_interpreter_of_its_own(box):
    source = """
import atexit, sys, threading
from dataclasses import dataclass
from collections import Counter

@dataclass
class Point:
    x: int

def main():
    print(__name__, Point(1), Counter(input().split()), file=sys.stdout)

if __name__ == "__main__":
    sys.setrecursionlimit(1 << 20)
    threading.stack_size(64 << 20)
    thread = threading.Thread(target=main)
    thread.start()
    atexit.register(print, "end")
    thread.join()
    sys.stdout.write(sys.stdin.read())
    exit(0)
"""
    run = box.run(Program(source), b"a b a\nrest", LIMITS)
    assert run.stdout == b"__main__ Point(x=1) Counter({'a': 2, 'b': 1})\nrestend\n" and run.clean, run


@pytest.mark.parametrize(
    ("source", "status"),
    [("exit()", 0), ("import sys; sys.exit(3)", 3), ("raise SystemExit('why')", 1), ("1/0", 1), ("syntax error", 1)],
)
def test_the_exit_status_is_that_of_an_interpreter(box, source, status):
    run = box.run(Program(source), b"", LIMITS)
    assert (run.ending, run.status) == ("exited", status)
    assert subprocess.run([sys.executable, "-c", source], capture_output=True).returncode == status


def test_hashes_are_the_same_each_time(box):
    outputs = {box.run(Program("print(hash('a'), set('hash order'))"), b"", LIMITS).stdout for _ in range(3)}
    assert len(outputs) == 1
