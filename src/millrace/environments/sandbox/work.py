"""The last step of every box: the process does what it was asked to, and ends with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from millrace.environments.sandbox.native import compile_source, run_binary, run_command
from millrace.environments.sandbox.program import run_batch, run_program
from millrace.environments.sandbox.run import Program
from millrace.environments.sandbox.syscall_filter import Profile

FIRST_FILE = 4
"""Descriptor of the first file that a work brings along; 3 is the pipe for the start."""


def do_work(header: Mapping[str, Any], files: Sequence[int]) -> NoReturn:
    """`header` and the files as `wire.work_to_wire` gives them."""
    match header["kind"]:
        case "compile":
            compile_source(header["source"])
        case "command":
            run_command(header["argv"])
        case "binary":
            run_binary(files[0])
        case "batch":
            run_batch(Program(**header["program"]), files, header["mark"])
    run_program(Program(**header["program"]))


def compiles(header: Mapping[str, Any]) -> bool:
    """Whether the work needs a folder to compile in, and processes."""
    return bool(header["kind"] == "compile")


def filter_of(header: Mapping[str, Any]) -> Profile:
    """What the work may ask the kernel for."""
    profiles: Mapping[str, Profile] = {"compile": "compiler", "command": "commands"}
    return profiles.get(header["kind"], "program")
