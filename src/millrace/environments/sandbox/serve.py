"""The server of a node that verifies: `python -m millrace.environments.sandbox.serve MEETING NODE ADDRESS WORKERS`.

It tests the programs that verifiers of its job send (`remote` says how they speak), in WORKERS processes, and listens
on ADDRESS alone. MEETING is the folder of the job's rendezvous: the token is read there, and the port stands there once
it listens. Expected values stay in the workers; a box gets what it gets on one machine. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millrace.environments.sandbox.cpp import require_compiler
from millrace.environments.sandbox.frames import pack, receive
from millrace.environments.sandbox.places import worker_pool
from millrace.environments.sandbox.remote import server_file
from millrace.environments.sandbox.tiers import NoSandboxError, choose_tier
from millrace.environments.verifier_pool import VerifierStartError
from millrace.rollout.rendezvous import Rendezvous, write_json

HELLO_S, HELLO_BYTES = 10.0, 4096
"""How long a stranger may take to say who he is, and how much he may say."""

log = logging.getLogger("millrace.environments")


class ProgramServer:
    """Tests programs for whoever knows the token."""

    def __init__(self, token: str, workers: int) -> None:
        self._token, self._workers = token, workers
        self._pool = worker_pool(workers)
        self._tiers = dict[str, str]()
        self._compiling = set[str]()
        self._trying = asyncio.Lock()

    async def close(self) -> None:
        await self._pool.close()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one verifier, until it closes the connection; what it left unfinished is dropped. A program that goes
        without an answer closes it too, so that nobody waits for one."""
        tasks = set[asyncio.Task[None]]()

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("the connection is closed: a program could not be answered", exc_info=error)
                writer.transport.abort()

        try:
            hello = await self._hello(reader, writer)
            tier = await self._welcome(hello, writer) if hello else None
            if hello is None or tier is None:
                return
            tasks.add(asyncio.create_task(_beat(writer, hello["beat_s"])))
            while (request := await receive(reader)) is not None:
                task = asyncio.create_task(self._answer(request, tier, writer))
                tasks.add(task)
                task.add_done_callback(ended)
        finally:
            for task in list(tasks):
                task.cancel()
            writer.close()

    async def _hello(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, Any] | None:
        """What a verifier of the run says first; None from anybody else."""
        try:
            hello = await asyncio.wait_for(receive(reader, HELLO_BYTES), HELLO_S)
        except TimeoutError:
            return None
        if hello and not hmac.compare_digest(str(hello.get("token")).encode(errors="replace"), self._token.encode()):
            await _send(writer, {"refused": "the token is not that of its run"})
            return None
        return hello

    async def _welcome(self, hello: Mapping[str, Any], writer: asyncio.StreamWriter) -> str | None:
        """The tier of a connection's boxes; None where this machine cannot make what is wanted."""
        try:
            tier = await self._tier(hello["tier"], compiles=hello["compiles"])
        except NoSandboxError as error:
            await _send(writer, {"refused": str(error)})
            return None
        await _send(writer, {"tier": tier, "workers": self._workers})
        return tier

    async def _tier(self, wanted: str, *, compiles: bool) -> str:
        """The tier that this machine makes for what a recipe wants; each is tried once."""
        async with self._trying:
            if wanted not in self._tiers:
                self._tiers[wanted] = await asyncio.to_thread(choose_tier, wanted)
                log.info("sandbox tier %s, in %d workers", self._tiers[wanted], self._workers)
            tier = self._tiers[wanted]
            if compiles and tier not in self._compiling:
                await asyncio.to_thread(require_compiler, tier)
                self._compiling.add(tier)
        return tier

    async def _answer(self, request: Mapping[str, Any], tier: str, writer: asyncio.StreamWriter) -> None:
        try:
            verdict = await self._pool.verify({**request["job"], "tier": tier}, limit_s=request["limit_s"])
            reply = {"outcome": verdict.outcome, "result": verdict.result, "reason": verdict.reason}
        except VerifierStartError as error:
            log.warning("%s", error)
            reply = {"outcome": "crash", "result": None, "reason": str(error)}
        await _send(writer, {"number": request["number"], **reply})


async def _beat(writer: asyncio.StreamWriter, every_s: float) -> None:
    while True:
        await _send(writer, {})
        await asyncio.sleep(every_s)


async def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # its end is seen where it is read
        writer.write(pack(message))
        await writer.drain()


async def serve(meeting: Rendezvous, node: int, address: str, workers: int) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    program_server = ProgramServer(meeting.token(), workers)
    server = await asyncio.start_server(program_server.connection, address, 0)
    port = server.sockets[0].getsockname()[1]
    write_json(server_file(meeting, node), {"address": address, "port": port})
    log.info("listening on %s:%d", address, port)
    await stop.wait()
    server.close()
    await program_server.close()


def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    folder, node, address, workers = arguments
    asyncio.run(serve(Rendezvous(Path(folder)), int(node), address, int(workers)))


if __name__ == "__main__":
    main(sys.argv[1:])
