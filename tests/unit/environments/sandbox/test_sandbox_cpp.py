"""C++ in the sandbox: what compilers and programs must not do, in every tier that this machine can make."""

import os
import tempfile

import pytest
from cpp_abuse_programs import COMPILED, ENDLESS, QUICK, source
from processes import no_process_left

from millrace.environments.sandbox import check as worker
from millrace.environments.sandbox import cpp
from millrace.environments.sandbox.cpp import compile_program, compiler_limits, compiler_problem, require_compiler
from millrace.environments.sandbox.run import Binary, CppProgram, Limits, Run, SandboxFault
from millrace.environments.sandbox.single_boxes import OpenBox
from millrace.environments.sandbox.tiers import NoSandboxError, choose_tier

LIMITS = Limits(wall_s=20.0, cpu_s=5, memory_bytes=512 << 20)
SHORT = LIMITS._replace(wall_s=0.25)
COMPILER = compiler_limits(cpu_s=10, wall_s=60.0, memory_bytes=1 << 30)
TIGHT = compiler_limits(cpu_s=1, wall_s=20.0, memory_bytes=256 << 20)
ADD = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << '\\n'; }"


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        require_compiler(choose_tier("auto"))
    except NoSandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def abuse():
    """All attempts, compiled without a box: what the boxes do to the binary is tested here."""
    limits = COMPILER._replace(cpu_s=60, wall_s=120.0)
    made = compile_program(OpenBox(), CppProgram(source()), limits)
    assert isinstance(made, Binary), made
    return made


def attempt(box, host, abuse, name, limits):
    words = [host[key] for key in ("secret", "writable", "tests", "victim", "port", "abstract")]
    return box.run(abuse, "\n".join(map(str, (name, *words))).encode(), limits)


@pytest.mark.parametrize("name", QUICK)
def test_what_a_compiled_program_must_not_do_fails(box, host, abuse, name):
    run = attempt(box, host, abuse, name, LIMITS)
    assert b"ESCAPED" not in run.stdout, run
    assert run.ending in ("exited", "killed"), run


@pytest.mark.parametrize(
    "name", ["read_secret", "fork", "shell", "connect", "abstract_socket", "memory_file", "trace_me"]
)
def test_the_same_attempts_succeed_without_a_box(host, abuse, name):
    run = attempt(OpenBox(), host, abuse, name, LIMITS)
    assert b"ESCAPED" in run.stdout, run


@pytest.mark.parametrize("name", ENDLESS)
def test_a_compiled_program_that_does_not_end_is_ended(box, host, abuse, name):
    run = attempt(box, host, abuse, name, SHORT if "wall" in ENDLESS[name][1] else LIMITS)
    assert run.ending in ENDLESS[name][1] and not run.clean, run
    assert box.run(abuse, b"kill_all x x x 1 1 x", LIMITS).clean


@pytest.mark.parametrize("name", COMPILED)
def test_a_program_that_reaches_out_or_takes_too_much_does_not_compile(box, host, name):
    program = CppProgram(COMPILED[name].replace("SECRET", host["secret"]))
    made = compile_program(box, program, TIGHT)
    assert isinstance(made, str) and made.startswith("does not compile ("), made
    assert "secret" not in made.replace(host["secret"], "")


def test_a_program_is_compiled_and_run_and_nothing_is_left(box):
    before = set(os.listdir(tempfile.gettempdir()))
    made = compile_program(box, CppProgram("#include <bits/stdc++.h>\n" + ADD), COMPILER)
    assert isinstance(made, Binary), made
    run = box.run(made, b"3 4", LIMITS)
    assert run.clean and run.stdout == b"7\n", run
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("millrace-compile")]


def test_signals_and_limits_are_those_of_a_program_of_its_own(box):
    program = """
#include <csignal>
#include <cstdio>
#include <sys/resource.h>
int main() {
    int ignored = 0;
    for (int n = 1; n < 32; ++n) {
        struct sigaction now;
        sigaction(n, nullptr, &now);
        ignored += now.sa_handler == SIG_IGN;
    }
    rlimit memory; getrlimit(RLIMIT_AS, &memory);
    std::printf("%d %ld\\n", ignored, (long)memory.rlim_cur >> 20);
}
"""
    made = compile_program(box, CppProgram(program), COMPILER)
    assert box.run(made, b"", LIMITS).stdout == b"0 512\n"


class Failing:
    """A box whose compiler ends without a word about the program, the first `times`."""

    name = "failing"

    def __init__(self, box, times):
        self.box, self.times = box, times

    def run(self, work, stdin, limits):
        if isinstance(work, CppProgram) and self.times > 0:
            self.times -= 1
            return Run("exited", 1, b"", b"g++: fatal error: Killed signal terminated program cc1plus")
        return self.box.run(work, stdin, limits)


def test_a_compiler_that_fails_by_itself_is_no_failure_of_the_program(box):
    assert isinstance(compile_program(Failing(box, 1), CppProgram(ADD), COMPILER), Binary)
    with pytest.raises(SandboxFault, match=r"g\+\+ does not work in the sandbox \(g\+\+: fatal error: Killed"):
        compile_program(Failing(box, 2), CppProgram(ADD), COMPILER)


def test_a_machine_without_a_compiler_is_told_so_in_one_sentence(monkeypatch):
    monkeypatch.setattr(cpp, "open_tier", lambda tier: OpenBox())
    monkeypatch.setattr(OpenBox, "run", lambda *_: Run("exited", 127, b"", b"sh: 1: g++: not found"))
    assert compiler_problem(OpenBox()) == "the sandbox has no g++"
    with pytest.raises(NoSandboxError, match=r"C\+\+ programs cannot be tested .*: the sandbox has no g\+\+; "):
        require_compiler("unsafe")


SUMS = [(1, 2), (10, -4), (123456789, 1)]
TESTS = [{"input": f"{a} {b}\n", "expected": f"{a + b}\n"} for a, b in SUMS]


@pytest.fixture(scope="module")
def tier():
    with no_process_left():
        yield choose_tier("auto")
        worker.close_boxes()


def report(tier, source, **options):
    job = {"tier": tier, "program": {"source": source, "function": None}, "compiler": COMPILER._asdict()}
    job |= {"tests": TESTS, "limits": LIMITS._asdict(), "every": False, "tolerance": None, "tests_per_process": 1}
    return worker.check({**job, **options})


HEAD = """
#include <cstdio>
#include <cstdlib>
#include <unistd.h>
long a, b;
void get() { scanf("%ld %ld", &a, &b); }
"""
FORGED = {
    "nothing": "int main() {}",
    "exit_zero": "int main() { _exit(0); }",
    "exit_before_main": "struct First { First() { _exit(0); } } first;\nint main() { abort(); }",
    "wrong": 'int main() { get(); printf("%ld", a - b); }',
    "answer_then_failure": 'int main() { get(); printf("%ld", a + b); return 1; }',
    "answer_then_abort": 'int main() { get(); printf("%ld", a + b); fflush(stdout); abort(); }',
    "answer_then_fault": 'int main() { get(); printf("%ld", a + b); fflush(stdout); *(volatile int*)0 = 1; }',
    "answer_then_sleep": 'int main() { get(); printf("%ld", a + b); fflush(stdout); sleep(100); }',
    "answer_on_stderr": 'int main() { get(); fprintf(stderr, "%ld", a + b); }',
    "answer_and_more": 'int main() { get(); printf("%ld\\nPASS", a + b); }',
    "answer_as_float": 'int main() { get(); printf("%.1f", (double)(a + b)); }',
    "all_answers": 'int main() { for (int n = 0; n < 100; ++n) printf("%d\\n", n); }',
    "null_bytes": 'int main() { get(); printf("%ld%c", a + b, 0); }',
    "not_text": 'int main() { write(1, "\\xff\\xfe", 2); }',
    "other_descriptors": """
int main() { for (int n = 2; n < 64; ++n) dprintf(n, "{\\"ending\\": \\"exited\\", \\"status\\": 0}"); }
""",
    "does_not_compile": "int main() { return 3 }",
    "binary_in_the_message": "#error \\x7fELF\nint main() {}",
}


@pytest.mark.parametrize("name", FORGED)
def test_no_forged_compiled_program_passes(tier, name):
    limits = LIMITS._replace(wall_s=0.5) if name == "answer_then_sleep" else LIMITS
    done = report(tier, HEAD + FORGED[name], limits=limits._asdict(), every=True)
    assert done["decided"] and done["passed"] == 0 and done["failure"] is not None, done


def test_an_honest_compiled_program_passes_and_a_broken_one_says_why(tier):
    done = report(tier, ADD)
    assert (done["passed"], done["ran"], done["failure"], done["decided"]) == (3, 3, None, True)
    done = report(tier, "int main() { return 3 }", every=True)
    assert (done["passed"], done["ran"], done["decided"]) == (0, 0, True)
    assert done["failure"] == "does not compile (main.cpp:1:22: error: expected ';' before '}' token)"
