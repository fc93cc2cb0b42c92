"""Interpreters that keep their state from call to call, each in a box of its own, from the supervisor's side.

A box is one process tree of the tier that programs run in too: one kill ends it. It starts with the first call, and
anew with the first one after a call that a limit ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from millrace.environments.sandbox.boxes import SOURCES, START_LIMIT_S, interpreter_command
from millrace.environments.sandbox.confine import leaves_root, memory_file
from millrace.environments.sandbox.run import Limits, SandboxFault
from millrace.environments.sandbox.session import DONE, LENGTH, RAISED, READY
from millrace.environments.sandbox.single_boxes import (
    BubblewrapBox,
    LandlockBox,
    OpenBox,
    _bubblewrap_options,
    _popen,
    _SingleBox,
)
from millrace.environments.sandbox.tiers import UNSAFE

READ_BYTES = 1 << 16
START_TRIES = 2
OWN_PROCESSES = 3
"""Processes that the kernel counts in namespaces with the program's threads: the launcher, the one that waits, and the
first thread."""
SINGLE_BOXES: dict[str, type[_SingleBox]] = {"bubblewrap": BubblewrapBox, "landlock": LandlockBox, UNSAFE: OpenBox}

Ending = Literal["done", "raised", "time", "output", "died"]


@dataclass(frozen=True)
class Call:
    """How a call went."""

    ending: Ending
    output: str
    """What it printed; of one that was ended for too much output, the beginning."""
    seconds: float

    @property
    def lost_state(self) -> bool:
        return self.ending in ("time", "output", "died")


class SessionLauncher:
    """Starts the processes of sessions in one tier, which the caller has chosen by `choose_tier`."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self._box = None if tier == "zygote" else SINGLE_BOXES[tier]()

    def start(self, limits: Limits, channel: int, output: int) -> subprocess.Popen[bytes]:
        """`channel` becomes the session's channel, `output` its standard output and error."""
        box = self._box
        processes = box._processes(limits) if box else limits.processes + OWN_PROCESSES
        job = memory_file(json.dumps({"limits": limits._asdict(), "processes": processes}).encode())
        code = memory_file(box._code if box else b"")
        null = os.open(os.devnull, os.O_RDONLY)
        words = [box.how if box else "namespaces", str(job), str(channel)]
        try:
            return _popen(
                [*self._command(code), *words],
                null,
                output,
                output,
                (job, channel, code),
                drop=self.tier == "bubblewrap" and leaves_root(),
            )
        except OSError as error:
            raise SandboxFault(f"{self.tier}: {error}") from error
        finally:
            for descriptor in (job, code, null):
                os.close(descriptor)

    def _command(self, code: int) -> list[str]:
        box = self._box
        if box is None:
            return interpreter_command(sys._base_executable, str(SOURCES), "session")  # type: ignore[attr-defined]
        if isinstance(box, BubblewrapBox):
            inner = interpreter_command(box.interpreter, "/box/code.zip", "session")
            return [box._bwrap, *_bubblewrap_options(code), "--", *inner]
        return interpreter_command(box.interpreter, f"/proc/self/fd/{code}", "session")


class Interpreter:
    """One session. Calls come one after the other; all in one event loop."""

    def __init__(self, launcher: SessionLauncher, limits: Limits) -> None:
        self._launcher, self._limits = launcher, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._kept = bytearray()
        self._flooded = False

    async def call(self, source: str, wall_s: float) -> Call:
        """Run a source, for so long at most.

        Raises:
            SandboxFault: the box could not be made.
        """
        if self._process is None:
            await self._start()
        loop, began = asyncio.get_running_loop(), time.monotonic()
        content = source.encode(errors="backslashreplace")
        try:
            async with asyncio.timeout(wall_s):
                with suppress(ConnectionError):  # it ended between two calls
                    await loop.sock_sendall(self._channel, LENGTH.pack(len(content)) + content)
                status = await self._status()
        except TimeoutError:
            status, ending = b"", "time"
        else:
            ending = "output" if self._flooded else {DONE: "done", RAISED: "raised"}.get(status, "died")
        self._take()
        output, self._kept = self._kept.decode(errors="replace"), bytearray()
        call = Call(ending, output, time.monotonic() - began)  # type: ignore[arg-type]
        if call.lost_state:
            self.close()
        return call

    def close(self) -> None:
        """End it with all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        asyncio.get_running_loop().remove_reader(self._output)
        process.kill()
        process.wait()
        self._channel.close()
        self._output.close()

    async def _start(self) -> None:
        for last in range(1, START_TRIES + 1):
            self._channel, theirs = socket.socketpair()
            self._output, their_output = socket.socketpair()
            for end in (self._channel, self._output):
                end.setblocking(False)
            self._kept, self._flooded = bytearray(), False
            try:
                self._process = self._launcher.start(self._limits, theirs.fileno(), their_output.fileno())
            except BaseException:
                self._channel.close()
                self._output.close()
                raise
            finally:
                theirs.close()
                their_output.close()
            asyncio.get_running_loop().add_reader(self._output, self._take)
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    ready = await self._status() == READY
            except TimeoutError:
                ready = False
            except BaseException:
                self.close()
                raise
            if ready:
                return
            self._take()
            why = self._kept.decode(errors="replace").strip()[-500:] or "no message"
            self.close()
            if last == START_TRIES:
                raise SandboxFault(f"an interpreter could not be started (tier {self._launcher.tier}): {why}")

    async def _status(self) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(self._channel, 1)
        except ConnectionError:
            return b""

    def _take(self) -> None:
        """Take what was printed; a flood ends the process."""
        with suppress(BlockingIOError, ConnectionError):
            while not self._flooded:
                piece = self._output.recv(READ_BYTES)
                if not piece:
                    asyncio.get_running_loop().remove_reader(self._output)
                    return
                self._kept += piece
                self._flooded = len(self._kept) > self._limits.output_bytes
        if self._flooded and self._process is not None:
            asyncio.get_running_loop().remove_reader(self._output)
            self._process.kill()
