"""A fleet that stays: vLLM servers for one run after the other, which name them by `fleet.addresses`.

A run whose engines stay up starts in seconds, so this is for trying recipes out; and for engines on a machine of their
own. A server that ends is started again on its port; the run that uses it gives it weights as to one that was lost.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx

from millrace.config.schema import FleetConfig
from millrace.rollout.auth import TOKEN_VARIABLE
from millrace.rollout.engine import EngineProcess
from millrace.rollout.member import FleetError
from millrace.rollout.server import engine_device

WATCH_SECONDS = 0.2


class StandingFleet:
    """`config.engines` servers of one checkpoint, from `start` to `close`; call both in one thread.

    Raises FleetError where the environment has no token: runs must know it too.
    """

    def __init__(self, config: FleetConfig, model_path: str, folder: Path) -> None:
        token = os.environ.get(TOKEN_VARIABLE)
        if not token:
            raise FleetError(
                f"the environment variable {TOKEN_VARIABLE} is not set; set it to a secret of your own, here and where "
                "runs that use these servers are started"
            )
        device = engine_device()
        self._engines = [
            EngineProcess(index, config, model_path, folder, token, device, kind="server")
            for index in range(config.engines)
        ]
        self._restarts = [0] * config.engines
        self._starting = set(range(config.engines))
        self._most_restarts = config.max_restarts

    @property
    def addresses(self) -> list[str]:
        return [engine.url for engine in self._engines]

    @property
    def pids(self) -> list[int]:
        """Process of each server's supervisor, which is its process group too."""
        return [engine.pid for engine in self._engines]

    def start(self) -> None:
        for engine in self._engines:
            engine.spawn()

    def watch(self, stop: threading.Event, say: Callable[[str], object]) -> None:
        """Say of each server when it is ready and start those again that end, until `stop` is set. Raises FleetError
        for one that ends again and again."""
        while not stop.wait(WATCH_SECONDS):
            for index in range(len(self._engines)):
                self._revive(index, say)
            for index in [index for index in self._starting if _is_healthy(self._engines[index].url)]:
                self._starting.remove(index)
                say(f"{self._engines[index].name} is ready")

    def _revive(self, index: int, say: Callable[[str], object]) -> None:
        engine = self._engines[index]
        if (code := engine.exit_code()) is None:
            return
        if self._restarts[index] >= self._most_restarts:
            raise FleetError(
                f"{engine.name} ended {self._restarts[index] + 1} times. The last lines of {engine.log_path}:\n"
                f"{engine.log_tail()}"
            )
        self._restarts[index] += 1
        self._starting.add(index)
        say(f"{engine.name} ended with exit status {code}; it starts again")
        engine.kill()  # what its process group has left
        engine.spawn(int(engine.url.rsplit(":", 1)[1]))

    def close(self) -> None:
        """End all servers."""
        for engine in self._engines:
            engine.terminate()
        for engine in self._engines:
            engine.stop()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=WATCH_SECONDS, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def serve(config: FleetConfig, model_path: str, folder: Path, say: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM; says how a run names the servers."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    fleet = StandingFleet(config, model_path, folder)
    fleet.start()
    try:
        say(f"starting; logs in {folder / 'logs'}. For runs, with {TOKEN_VARIABLE} set as here:")
        say(f"fleet.engines=0 fleet.addresses=[{','.join(fleet.addresses)}]")
        fleet.watch(stop, say)
    finally:
        fleet.close()
