"""One vLLM server as a child process: started on a free port, watched, and ended with everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from millrace.config.schema import FleetConfig
from millrace.errors import MillraceError
from millrace.ports import hold_port, port_of
from millrace.rollout.server import MODEL_NAME, Device, server_command, server_environment

LOG_TAIL_LINES = 20
STOP_SECONDS = 10.0
PORT_IN_USE = "address already in use"


class EngineStartError(MillraceError):
    """An engine did not come up; the message ends with the last lines of its log."""


def last_lines(log: Path, start: int = 0) -> str:
    """The last lines of a log behind its byte `start`."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


class EngineProcess:
    """Engine `index` of a fleet, living at `url`; a respawned one keeps its index and log file and gets another port.

    kind: what it is called in messages and its log file; fleets of one run differ in it.

    `spawn` must be called from a thread that lives as long as the engine should: the kernel ends the engine with it.
    """

    def __init__(
        self,
        index: int,
        config: FleetConfig,
        model_path: str,
        run_dir: Path,
        token: str,
        device: Device,
        gpus: Sequence[str] = (),
        *,
        kind: str = "engine",
        served_name: str = MODEL_NAME,
    ) -> None:
        self.index = index
        self.kind = kind
        self.url = ""
        self.log_path = run_dir / "logs" / f"{kind}-{index}.log"
        self._served_name = served_name
        self._config = config
        self._model_path = model_path
        self._token = token
        self._device = device
        self._gpus = gpus
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._log_start = 0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.index} ({self.url})"

    @property
    def pid(self) -> int:
        """Process and process group of the engine's supervisor."""
        if self._process is None:
            raise RuntimeError(f"{self.kind} {self.index} was not started")
        return self._process.pid

    def spawn(self, port: int | None = None) -> None:
        """Start the server in a session of its own and return at once. port: a free one when absent."""
        host = self._config.interface
        port = self._hold(host, port)
        self.url = f"http://{host}:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "millrace.rollout.supervisor", str(os.getpid())]
        command += server_command(
            self._config,
            model_path=self._model_path,
            host=host,
            port=port,
            device=self._device,
            served_name=self._served_name,
        )
        environment = server_environment(
            self._config,
            model_path=self._model_path,
            inherited=os.environ,
            token=self._token,
            host=host,
            device=self._device,
            gpus=self._gpus,
        )
        with open(self.log_path, "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _hold(self, host: str, port: int | None) -> int:
        """Keep the port for the server until it is stopped or gets another one; a server binds it seconds later."""
        if self._port is not None and port == port_of(self._port):
            return port
        self._let_go()
        try:
            self._port = hold_port(host, port)
        except OSError:
            if port is None:
                raise
            return port  # somebody has it: the server's log will say so
        return port_of(self._port)

    def _let_go(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None

    def exit_code(self) -> int | None:
        """Exit status of the server, or None while it runs."""
        return None if self._process is None else self._process.poll()

    def terminate(self) -> None:
        """Ask the engine to end in order: the supervisor passes it on to the server alone."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End every process of the engine now, also stopped ones."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self, limit: float = STOP_SECONDS) -> None:
        """End the engine and everything it started: SIGTERM, and SIGKILL after `limit` seconds."""
        if self._process is None:
            return
        self.terminate()
        end = time.monotonic() + limit
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        self.kill()
        self._let_go()

    def log_tail(self) -> str:
        """The last lines that the present process wrote to its log."""
        return last_lines(self.log_path, self._log_start)

    def port_was_taken(self) -> bool:
        """Whether the present process ended because another one took its port first."""
        return self.exit_code() is not None and PORT_IN_USE in self.log_tail().lower()


class ExternalEngine:
    """A server that somebody else started: it can be watched and used, not restarted."""

    pid = None

    def __init__(self, index: int, url: str) -> None:
        self.index = index
        self.url = url.rstrip("/")

    @property
    def name(self) -> str:
        return f"engine {self.index} ({self.url})"

    def spawn(self) -> None:
        """Nothing: whoever started the server starts it again."""

    def exit_code(self) -> None:
        return None

    def kill(self) -> None:
        """Nothing: it belongs to somebody else."""

    def stop(self, limit: float = STOP_SECONDS) -> None:
        """Nothing: it belongs to somebody else."""

    def log_tail(self) -> str:
        return f"{self.url} was started elsewhere; see its own log"

    def port_was_taken(self) -> bool:
        return False
