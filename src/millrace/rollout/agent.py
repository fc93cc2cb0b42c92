"""Starts and watches the vLLM servers of one node, as rank 0 asks through the job's rendezvous (`remote`).

It starts a server on request only: whether one that ended is started again is for the fleet to say. When the job is
over all of them end. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from millrace.config.placement import ServerPlace
from millrace.config.schema import FleetConfig
from millrace.rollout.engine import STOP_SECONDS, EngineProcess
from millrace.rollout.placement import visible_gpus, with_peers
from millrace.rollout.remote import request_file, state_file
from millrace.rollout.rendezvous import Rendezvous, read_json, write_json
from millrace.rollout.server import Device, engine_device

POLL_SECONDS = 0.2

log = logging.getLogger("millrace.rollout")


class Agent:
    """The servers of node `node`, which listen on `address`.

    `run` must be called from a thread that lives as long as the servers should: the kernel ends them with it.
    """

    def __init__(self, run_dir: Path, meeting: Rendezvous, node: int, address: str) -> None:
        token, device = meeting.token(), engine_device()
        places = [place for place in meeting.placement.servers if place.node == node]
        self._servers = [_Server(place, run_dir, meeting, address, token, device) for place in places]

    def run(self, over: Callable[[], bool]) -> None:
        """Serve until `over()`, then end every server."""
        try:
            while not over():
                for server in self._servers:
                    server.step(time.monotonic())
                time.sleep(POLL_SECONDS)
        finally:
            self._end()

    def _end(self) -> None:
        for server in self._servers:
            server.terminate(time.monotonic())
        while any(server.running for server in self._servers):
            time.sleep(POLL_SECONDS / 4)
            for server in self._servers:
                server.mind_the_grace(time.monotonic())
        for server in self._servers:
            server.report()


class _Server:
    """The server of one place: one incarnation after the other."""

    def __init__(
        self, place: ServerPlace, run_dir: Path, meeting: Rendezvous, address: str, token: str, device: Device
    ) -> None:
        self._place, self._run_dir, self._address = place, run_dir, address
        self._token, self._device = token, device
        self._trainer = meeting.placement.trainer
        self._request, self._state = request_file(meeting, place), state_file(meeting, place)
        self._incarnation = 0
        self._process: EngineProcess | None = None
        self._told: dict[str, Any] = {}
        self._kill_at: float | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.exit_code() is None

    def step(self, now: float) -> None:
        """Do what is asked and say how it is."""
        asked = read_json(self._request)
        if asked and asked["incarnation"] != self._incarnation:
            self._start(asked)
        elif asked and self.running and asked["wanted"] == "killed":
            self._kill()
        elif asked and self.running and asked["wanted"] == "stopped":
            self.terminate(now)
        self.mind_the_grace(now)
        self.report()

    def _start(self, asked: Mapping[str, Any]) -> None:
        self._kill()
        self._incarnation, self._kill_at = asked["incarnation"], None
        if asked["wanted"] != "running":
            self._process = None
            return
        facts: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in asked["config"].items()
        }
        config = dataclasses.replace(FleetConfig(**facts), interface=self._address)
        self._process = EngineProcess(
            asked["index"],
            config,
            asked["model_path"],
            self._run_dir,
            self._token,
            self._device,
            with_peers(visible_gpus(self._place.gpus, self._device), self._peers(config)),
            kind=asked["kind"],
            served_name=asked["served_name"],
        )
        self._process.spawn(asked["port"])
        log.info("%s is starting, incarnation %d", self._process.name, self._incarnation)

    def _peers(self, config: FleetConfig) -> list[str]:
        """GPUs of the node's trainer ranks, if the server opens their memory."""
        if config.transport != "ipc":
            return []
        ranks = (one.ranks for one in self._trainer if one.node == self._place.node)
        return visible_gpus(range(sum(ranks)), self._device)

    def terminate(self, now: float) -> None:
        """Ask the server to end in order, once; `mind_the_grace` ends one that does not."""
        if self._process is not None and self.running and self._kill_at is None:
            self._process.terminate()
            self._kill_at = now + STOP_SECONDS

    def mind_the_grace(self, now: float) -> None:
        if self._kill_at is not None and now > self._kill_at:
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._kill_at = None

    def report(self) -> None:
        if not self._incarnation:
            return
        process = self._process
        code = 0 if process is None else process.exit_code()
        said = {
            "incarnation": self._incarnation,
            "pid": process.pid if process else None,
            "exit_code": code,
            "url": process.url if process else "",
        }
        if said != self._told:
            write_json(self._state, said)
            self._told = said
