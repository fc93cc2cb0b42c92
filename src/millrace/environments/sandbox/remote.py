"""Nodes that verify for a run: each has a server (`serve`), which this side finds through the job's rendezvous.

One connection carries all programs of a verifier to a server and the verdicts back, in any order. It opens with the
run's token, with the tier that the recipe wants and with whether C++ is to be compiled; the server answers with the
tier that its machine makes, or refuses. While it lives it gives a sign of life every few seconds. A connection that is
lost takes its programs' workers with it: they are counted, their programs go to another place, and the server is tried
again until it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.environments.sandbox.frames import ask, pack, receive
from millrace.environments.sandbox.tiers import NoSandboxError
from millrace.environments.verifier_pool import Verdict
from millrace.rollout.rendezvous import Rendezvous, read_json

BEAT_S = 5.0
"""Between two signs of life of a server."""
MISSED_BEATS = 6
"""So many in a row and the server counts as lost."""
RETRY_S = 1.0
START_LIMIT_S = 300.0
"""How long a server may take to come, and to try the tiers of its machine."""
WAIT_LOG_S = 10.0

log = logging.getLogger("millrace.environments")


@dataclass(frozen=True)
class VerifierServer:
    """A server as this side knows it."""

    name: str
    where: Callable[[], tuple[str, int] | None]
    """Address and port; None before it listens. A server that was started anew may have others."""
    token: str


def server_file(meeting: Rendezvous, node: int) -> Path:
    """Where the server of a node says how it is reached."""
    return meeting.servers / f"verifier-{node}.json"


def servers_of(meeting: Rendezvous) -> list[VerifierServer]:
    """Those of a job."""
    token = meeting.token()
    return [_server(meeting, verifier.node, token) for verifier in meeting.placement.verifiers]


def _server(meeting: Rendezvous, node: int, token: str) -> VerifierServer:
    def where() -> tuple[str, int] | None:
        said = read_json(server_file(meeting, node))
        return (said["address"], said["port"]) if said else None

    return VerifierServer(f"node {node}", where, token)


def remote_places(servers: Sequence[VerifierServer], tier: str, *, compiles: bool) -> list[RemotePlace]:
    """The places of servers, which are asked all at one time.

    Raises:
        NoSandboxError: one does not come, or refuses.
    """
    if not servers:
        return []
    with ThreadPoolExecutor(len(servers)) as threads:
        return list(threads.map(lambda server: RemotePlace(server, tier, compiles=compiles), servers))


class RemotePlace:
    """The workers of one server. Waits for the server, so that a node without a sandbox ends the run at its start.

    Raises:
        NoSandboxError
    """

    def __init__(self, server: VerifierServer, tier: str, *, compiles: bool) -> None:
        self.name = server.name
        self._where = server.where
        self._hello = {"token": server.token, "tier": tier, "compiles": compiles, "beat_s": BEAT_S}
        welcome = self._first_word()
        self.tier, self.workers = welcome["tier"], welcome["workers"]
        self.ready = False
        self._writer: asyncio.StreamWriter | None = None
        self._replies = dict[int, asyncio.Future[Verdict]]()
        self._numbers = itertools.count()
        self._silent = 0
        self._task: asyncio.Task[None] | None = None

    def open(self, changed: Callable[[], None]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._stay_connected(changed))

    async def verify(self, job: Mapping[str, Any], limit_s: float) -> Verdict:
        number = next(self._numbers)
        # Tests may be megabytes, and others wait for the loop.
        message = await asyncio.to_thread(pack, {"number": number, "job": job, "limit_s": limit_s})
        if self._writer is None:
            return self._lost_verdict()
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(message)
            with contextlib.suppress(OSError):  # whoever reads the connection sees its end too
                await self._writer.drain()
            return await reply
        finally:
            self._replies.pop(number, None)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _first_word(self) -> dict[str, Any]:
        began = logged = time.monotonic()
        while True:
            problem = "it does not listen"
            if (address := self._where()) is not None:
                try:
                    return self._accepted(ask(address, self._hello, START_LIMIT_S))
                except OSError as error:
                    problem = str(error)
            now = time.monotonic()
            if now - began > START_LIMIT_S:
                raise NoSandboxError(
                    f"waited {START_LIMIT_S:g} s for the verifier of {self.name} in vain ({problem}); see its log, "
                    "logs/verifier-*.log in the run's folder"
                )
            if now - logged > WAIT_LOG_S:
                logged = now
                log.info("waiting for the verifier of %s, %.0f s of %g s", self.name, now - began, START_LIMIT_S)
            time.sleep(0.1)

    def _accepted(self, welcome: dict[str, Any]) -> dict[str, Any]:
        if "refused" in welcome:
            raise NoSandboxError(f"the verifier of {self.name} refuses: {welcome['refused']}")
        if not {"tier", "workers"} <= welcome.keys():
            raise ConnectionError(f"who answers for the verifier of {self.name} is none")
        return welcome

    async def _stay_connected(self, changed: Callable[[], None]) -> None:
        reason = ""
        while True:
            try:
                reason = await self._session(changed)
            except (OSError, NoSandboxError) as error:
                if str(error) != reason:
                    log.warning("%s", error)
                reason = str(error)
            finally:
                self._disconnect()
            await asyncio.sleep(RETRY_S)

    async def _session(self, changed: Callable[[], None]) -> str:
        """One connection, from its opening to its end; why it ended."""
        address = self._where()
        if address is None:
            raise ConnectionError(f"the verifier of {self.name} does not listen")
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(pack(self._hello))
            welcome = await asyncio.wait_for(receive(reader), START_LIMIT_S)
            if welcome is None:
                raise ConnectionError(f"the verifier of {self.name} closed the connection")
            self.tier = self._accepted(welcome)["tier"]
            self._writer, self.ready, self._silent = writer, True, 0
            changed()
            reading = asyncio.ensure_future(self._read(reader))
            try:
                while self._silent < MISSED_BEATS and not reading.done():
                    # Counted, not timed: between two batches this loop stands still.
                    await asyncio.wait({reading}, timeout=BEAT_S)
                    self._silent += 1
            finally:
                reading.cancel()
        finally:
            writer.transport.abort()  # closing would wait for a server that reads no more
        reason = f"lost the verifier of {self.name}" + ("" if reading.done() else ", which gave no sign of life")
        log.warning("%s; its programs go to others", reason)
        return reason

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (message := await receive(reader)) is not None:
            self._silent = 0
            reply = self._replies.get(message.get("number", -1))  # a sign of life has none
            if reply is not None and not reply.done():
                reply.set_result(Verdict(message["outcome"], message["result"], message["reason"]))

    def _disconnect(self) -> None:
        self._writer, self.ready = None, False
        for reply in self._replies.values():
            if not reply.done():
                reply.set_result(self._lost_verdict())

    def _lost_verdict(self) -> Verdict:
        return Verdict("crash", reason=f"the verifier of {self.name} was lost")
