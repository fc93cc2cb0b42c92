"""A process in a box that forks once for each program: `python -P -s -S -B -c ... SOCKET`.

Jobs come over its socket, one after the other. For each it forks a keeper, which reads the job, makes a process
namespace and forks the program into it as its first process: whatever the program starts ends with it. The keeper
stays outside, takes the output, kills at the limits, and answers. When a keeper dies, the zygote says so in its place.

The interpreter was started with no environment, imports nothing of Millrace but this folder, and never reads a job, so
there is nothing in its memory that a program may not read: not even what earlier programs were.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

from millrace.environments.sandbox import kernel
from millrace.environments.sandbox.collect import STARTED, collect
from millrace.environments.sandbox.confine import arrange, close_from, memory_file, refuse_calls, set_limits
from millrace.environments.sandbox.namespaces import enter_box, mount_scratch
from millrace.environments.sandbox.program import WARM_MODULES
from millrace.environments.sandbox.run import COMPILER_BYTES, Limits, Run, SandboxFault
from millrace.environments.sandbox.wire import cut, receive, run_to_wire, send
from millrace.environments.sandbox.work import FIRST_FILE, compiles, do_work, filter_of

OWN_PROCESSES = 4
"""Processes that the kernel counts with the program's threads: launcher, zygote, keeper, and the first thread."""


def main() -> None:
    """Build the box, become its first process, serve until the socket closes."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    sys.path.pop(0)  # the way to Millrace itself
    for name in WARM_MODULES:
        importlib.import_module(name)
    try:
        enter_box()
        kernel.die_with_parent(signal.SIGKILL)  # after the change of user, which would undo it
        kernel.unshare(kernel.CLONE_NEWPID)
    except OSError as error:
        send(channel, {"ready": False, "why": str(error)})
        return
    inner = os.fork()
    if inner:
        channel.close()
        _, status = os.waitpid(inner, 0)
        sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
    kernel.die_with_parent(signal.SIGKILL)
    _serve(channel)


def _serve(channel: socket.socket) -> None:
    _drop_unneeded_descriptors(channel.fileno())
    gc.collect()
    gc.freeze()  # so that a child that collects does not copy what it shares with this process
    send(channel, {"ready": True})
    while channel.recv(1, socket.MSG_PEEK):
        keeper = os.fork()
        if not keeper:
            _keep(channel)
        _, status = os.waitpid(keeper, 0)
        if status:
            send(channel, {"fault": f"the keeper of the run ended with status {os.waitstatus_to_exitcode(status)}"})


def _keep(channel: socket.socket) -> NoReturn:
    """Take one job, run it and answer it; ends the process with status 0 when the answer is out, or nobody is left who
    wants one."""
    status = 1
    try:
        kernel.die_with_parent(signal.SIGKILL)
        request = receive(channel)
        if request is None:
            os._exit(0)
        header, files = request
        limits = Limits(**header["limits"])
        if compiles(header["work"]):
            limits = limits._replace(scratch_bytes=COMPILER_BYTES)
        try:
            answer, payload = run_to_wire(_start(header["work"], cut(files, header["sizes"]), limits))
        except (SandboxFault, OSError) as error:
            answer, payload = {"fault": str(error)}, b""
        send(channel, answer, payload)
        status = 0
    finally:
        os._exit(status)


def _start(work: dict[str, Any], contents: list[bytes], limits: Limits) -> Run:
    """Run a work whose standard input is the first of `contents`, and whose files are the others."""
    out, err, started = os.pipe(), os.pipe(), os.pipe()
    files = [memory_file(content) for content in contents]
    kernel.unshare(kernel.CLONE_NEWPID | (kernel.CLONE_NEWNS if limits.scratch_bytes else 0))
    pid = os.fork()
    if not pid:
        _become_program(work, limits, [files[0], out[1], err[1], started[1], *files[1:]])
    for descriptor in (*files, out[1], err[1], started[1]):
        os.close(descriptor)
    return collect(pid, out[0], err[0], started[0], limits)


def _become_program(work: dict[str, Any], limits: Limits, descriptors: list[int]) -> NoReturn:
    """In the child: give up everything, say that the program begins, and run it. `descriptors` become the first ones:
    the streams, the pipe for the start, and the work's files."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        os.setsid()
        arrange(descriptors)
        if limits.scratch_bytes:
            mount_scratch(limits.scratch_bytes, limits.scratch_inodes)
        kernel.drop_capabilities()
        set_limits(limits, limits.processes + OWN_PROCESSES)
        gc.enable()
        refuse_calls(os.getpid(), profile=filter_of(work))
        os.write(3, STARTED)
        os.close(3)
    except BaseException as error:  # noqa: BLE001, reported by what is not written to `started`
        with suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    do_work(work, range(FIRST_FILE, len(descriptors)))


def _drop_unneeded_descriptors(channel: int) -> None:
    """Keep the socket alone; 0, 1 and 2 become /dev/null."""
    null = os.open("/dev/null", os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    os.closerange(3, channel)
    close_from(channel + 1)
