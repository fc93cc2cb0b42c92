"""An interpreter in a box that keeps its state from call to call: `python -P -s -S -B -c ... HOW JOB CHANNEL`.

HOW is `namespaces` or `landlock` (the box is made here), `bubblewrap` (the process is in it already) or `none`. JOB is
a file with the limits; over the socket CHANNEL come sources, each behind its length, and each is answered with one byte
when it has run. What the program prints goes to descriptors 1 and 2. Nothing of this decides a reward.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import json
import linecache
import os
import signal
import struct
import sys
import traceback
import types
from typing import NoReturn

from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.confine import allow_files_only, become_nobody, close_from, refuse_calls, set_limits
from millrace.environments.sandbox.namespaces import (
    DEVICES,
    SYSTEM_FILES,
    SYSTEM_FOLDERS,
    enter_box,
    interpreter_folder,
)
from millrace.environments.sandbox.program import WARM_MODULES
from millrace.environments.sandbox.run import Limits

READY, DONE, RAISED = b"s", b"d", b"r"
LENGTH = struct.Struct("=I")
CHANNEL = 3


def main() -> NoReturn:
    how, job, channel = sys.argv[1], int(sys.argv[2]), os.dup2(int(sys.argv[3]), 63)
    sys.path.pop(0)  # the way to Millrace itself
    with open(job, "rb") as file:
        header = json.loads(file.read())
    os.dup2(channel, CHANNEL)
    close_from(CHANNEL + 1)
    for name in WARM_MODULES:
        importlib.import_module(name)
    if how == "namespaces":
        _enter_namespaces()
    if how == "landlock":
        os.chdir("/")
        become_nobody()
        if os.geteuid() == 0:
            kernel.lock_privileges()
            kernel.drop_capabilities()
        allow_files_only((*SYSTEM_FOLDERS, *SYSTEM_FILES, interpreter_folder()), DEVICES)
    kernel.die_with_parent(signal.SIGKILL)
    set_limits(Limits(**header["limits"]), header["processes"])
    if how != "none":
        refuse_calls(os.getpid())
    os.write(CHANNEL, READY)
    serve()


def _enter_namespaces() -> None:
    """Go on as the first process of a new box. The one that was started waits for its end outside."""
    enter_box()
    kernel.die_with_parent(signal.SIGKILL)  # after the change of user, which would undo it
    kernel.unshare(kernel.CLONE_NEWPID)
    inner = os.fork()
    if inner:
        close_from(0)
        _, status = os.waitpid(inner, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.setsid()
    kernel.drop_capabilities()


def serve() -> NoReturn:
    """Run what comes, until the channel closes."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r", closefd=False)), "utf-8")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(io.FileIO(target, "w", closefd=False)), "utf-8", errors="backslashreplace")
        for target in (1, 2)
    )
    sys.argv = ["cell"]
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)
    main_module = types.ModuleType("__main__")
    main_module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main_module
    number = 0
    while (source := _receive()) is not None:
        number += 1
        status = _run(source, f"<call {number}>", main_module)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(CHANNEL, status)
    os._exit(0)


def _receive() -> str | None:
    length = _read(LENGTH.size)
    if length is None:
        return None
    source = _read(LENGTH.unpack(length)[0])
    return None if source is None else source.decode()


def _read(size: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < size:
        piece = os.read(CHANNEL, size - len(pieces))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)


def _run(source: str, name: str, module: types.ModuleType) -> bytes:
    """Run a source in the module; what its last line evaluates to is shown, as a notebook does."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    tree = None
    try:
        tree = ast.parse(source, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), module.__dict__)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), module.__dict__)
            if shown is not None:
                sys.stdout.write(f"{shown!r}\n")
    except SystemExit as leave:
        sys.stderr.write(f"SystemExit: {leave.code}\n")
        return RAISED
    except BaseException as error:  # noqa: BLE001, as the interpreter itself: print it
        sys.stdout.flush()
        trace = _of_the_program(error.__traceback__) if tree is not None else None
        traceback.print_exception(error.with_traceback(trace))
        return RAISED
    return DONE


def _of_the_program(trace: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback without the frames of this module at its top."""
    while trace is not None and trace.tb_frame.f_code.co_filename == _run.__code__.co_filename:
        trace = trace.tb_next
    return trace
