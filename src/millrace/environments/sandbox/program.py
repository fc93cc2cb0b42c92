"""The program's side of the box: runs the source in this process and ends it.

By now the process has given up everything it could; what the program finds in its memory is this module and what the
caller handed over: source and input. Expected values were never here.
"""

from __future__ import annotations

import atexit
import builtins
import io
import json
import os
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from millrace.environments.sandbox.run import Program

WARM_MODULES = (
    "abc", "array", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum",
    "fractions", "functools", "heapq", "io", "itertools", "json", "math", "operator", "queue", "random", "re",
    "statistics", "string", "struct", "textwrap", "threading", "time", "typing",
)  # fmt: skip
"""What contest programs import; a zygote has them loaded."""


def run_program(program: Program) -> NoReturn:
    """Run it with descriptors 0, 1 and 2 as its streams. Never returns: the process ends with the exit status that
    the interpreter would have had."""
    status = _run_to_end(program)
    os._exit(_finish(status))


def run_batch(program: Program, inputs: Sequence[int], mark: str) -> NoReturn:
    """Run it on each file of `inputs`, to the first that it does not end cleanly on, and write `mark` behind each."""
    out = os.dup(1)
    for each in inputs:
        os.dup2(each, 0)
        os.close(each)
        os.dup2(out, 1)
        status = _run_to_end(program)
        if "threading" in sys.modules and sys.modules["threading"].active_count() > 1:
            os._exit(1)  # what still runs would write into the next one's output
        if status := _finish(status, last=False):
            os._exit(status)
        os.write(out, f"{mark}\n".encode())
    os._exit(0)


def _run_to_end(program: Program) -> int:
    _fresh_streams()
    try:
        return _run(program)
    except SystemExit as leave:
        return _exit_status(leave.code)
    except BaseException as error:  # noqa: BLE001, as the interpreter itself: print it, and end with status 1
        sys.excepthook(type(error), error, _of_the_program(error.__traceback__))
        return 1


def _run(program: Program) -> int:
    if program.function is None:
        _execute(program.source, types.ModuleType("__main__"))
        return 0
    answers = os.dup(1)
    os.dup2(2, 1)  # what the solution prints is no answer
    arguments = json.loads(sys.stdin.read())
    solution = types.ModuleType("solution")
    solution.__dict__.update((name, getattr(typing, name)) for name in typing.__all__)
    call = _callable(_execute(program.source, solution), program.function)
    value = json.dumps(call(*arguments), allow_nan=False).encode()
    while value:
        value = value[os.write(answers, value) :]
    os.close(answers)
    return 0


def _execute(source: str, module: types.ModuleType) -> dict[str, Any]:
    """The names that the source leaves behind, run as the module."""
    module.__dict__["__builtins__"] = builtins
    sys.modules[module.__name__] = module
    exec(compile(source, "main.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _callable(names: dict[str, Any], function: str) -> Any:
    solution = names.get("Solution")
    if isinstance(solution, type) and hasattr(solution, function):
        return getattr(solution(), function)
    if function not in names:
        raise NameError(f"the program defines neither {function} nor a class Solution with it")
    return names[function]


def _fresh_streams() -> None:
    """Streams as an interpreter has them that was started on these descriptors; and `exit`, which comes with the site
    module."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r", closefd=False)), "utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", errors="backslashreplace", line_buffering=True
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    sys.argv = ["main.py"]
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)


def _of_the_program(trace: types.TracebackType | None) -> types.TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename == _run.__code__.co_filename:
        trace = trace.tb_next
    return trace


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1


def _finish(status: int, *, last: bool = True) -> int:
    """What the interpreter does at its end: wait for threads (where nothing follows), call exit handlers, flush."""
    try:
        if last and (threading := sys.modules.get("threading")):
            threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
    except BaseException:  # noqa: BLE001, the program replaced what is called here
        return status or 120
    return status
