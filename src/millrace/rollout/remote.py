"""An engine on another node: asked for through files of the job's rendezvous, where that node's agent starts it.

    servers/PLACE.request.json    what rank 0 wants: which incarnation, running or not, and how it is started
    servers/PLACE.state.json      what the agent says: incarnation, process id, exit code

A place (`engine-0`, `judge-NAME-0`, `teacher-0`) has one server at a time; each start is a new incarnation, so that
what is said of an earlier one is never taken for the present one.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from millrace.config.placement import ServerPlace
from millrace.config.schema import FleetConfig
from millrace.rollout.engine import PORT_IN_USE, STOP_SECONDS, last_lines
from millrace.rollout.rendezvous import SILENT_SECONDS, Pulse, Rendezvous, read_json, write_json
from millrace.rollout.server import MODEL_NAME

LOST = 255
"""Exit code of an engine whose node has fallen silent."""
LOOK_SECONDS = 0.4
"""How often the agent's word is read; the fleet asks more often."""
FIRST_PORT, PORTS = 10_000, 22_768
"""Below the range from which the kernel numbers outgoing connections."""

Wanted = Literal["running", "stopped", "killed"]


class RemoteEngine:
    """Like `EngineProcess`, for a server that the agent of node `place.node` starts."""

    def __init__(
        self,
        index: int,
        config: FleetConfig,
        model_path: str,
        run_dir: Path,
        meeting: Rendezvous,
        place: ServerPlace,
        *,
        kind: str = "engine",
        served_name: str = MODEL_NAME,
    ) -> None:
        self.index, self.kind, self.url = index, kind, ""
        self.log_path = run_dir / "logs" / f"{kind}-{index}.log"
        self._how = {
            "kind": kind,
            "index": index,
            "model_path": model_path,
            "served_name": served_name,
            "config": dataclasses.asdict(config),
        }
        self._meeting, self._place = meeting, place
        self._request, self._state = request_file(meeting, place), state_file(meeting, place)
        self._incarnation = int(read_json(self._request).get("incarnation", 0))
        self._port = 0
        self._log_start = 0
        self._pulse = Pulse()
        self._looked_at, self._seen, self._lost = 0.0, dict[str, Any](), False

    @property
    def name(self) -> str:
        return f"{self.kind} {self.index} ({self.url})"

    @property
    def pid(self) -> int | None:
        """Process of the engine's supervisor on its node; None before its agent has started it."""
        return self._look().get("pid")

    def spawn(self) -> None:
        """Ask the node's agent for a server, and return at once. The address it will have is known now."""
        state = self._meeting.node(self._place.node)
        assert state is not None, "the trainer starts when every node has come"
        self._incarnation += 1
        self._port = port_of(self._meeting.folder.name, self._place, self._incarnation)
        self.url = f"http://{state.address}:{self._port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._seen, self._looked_at = {}, 0.0
        self._want("running")

    def exit_code(self) -> int | None:
        """Exit status of the server, or None while it runs or waits for its agent; LOST when its node is silent."""
        code = self._look().get("exit_code")
        return LOST if code is None and self._lost else code

    def terminate(self) -> None:
        """Ask the engine to end in order."""
        if self._incarnation:
            self._want("stopped")

    def kill(self) -> None:
        """Ask the agent to end every process of the engine now; a new incarnation starts only after that."""
        if self._incarnation:
            self._want("killed")

    def stop(self, limit: float = STOP_SECONDS) -> None:
        """End the engine in order, and return when it has ended or its agent took twice the limit for it."""
        if not self._incarnation:
            return
        self.terminate()
        end = time.monotonic() + 2 * limit
        while self.exit_code() is None and not self._meeting.over and time.monotonic() < end:
            time.sleep(0.05)

    def log_tail(self) -> str:
        """The last lines that the present server wrote to its log."""
        if self._lost:
            return f"node {self._place.node} gives no sign of life any more"
        return last_lines(self.log_path, self._log_start) if self.log_path.exists() else ""

    def port_was_taken(self) -> bool:
        """Whether the present server ended because its port was another process's."""
        return self.exit_code() is not None and PORT_IN_USE in self.log_tail().lower()

    def _want(self, wanted: Wanted) -> None:
        request = {"incarnation": self._incarnation, "wanted": wanted, "port": self._port, **self._how}
        write_json(self._request, request)

    def _look(self) -> Mapping[str, Any]:
        """What the agent says of the present incarnation; nothing before it has seen the request."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            said, node = read_json(self._state), self._meeting.node(self._place.node)
            self._seen = said if said.get("incarnation") == self._incarnation else {}
            self._lost = node is not None and self._pulse.silent_for(node, now) > SILENT_SECONDS
        return self._seen


def request_file(meeting: Rendezvous, place: ServerPlace) -> Path:
    return meeting.servers / f"{place.kind}-{place.index}.request.json"


def state_file(meeting: Rendezvous, place: ServerPlace) -> Path:
    return meeting.servers / f"{place.kind}-{place.index}.state.json"


def port_of(job: str, place: ServerPlace, incarnation: int) -> int:
    """The port of one incarnation: another for each job, so that jobs on one node do not meet; one that is taken
    nevertheless ends the server, and the next incarnation has another."""
    text = f"{job} {place.kind} {place.index} {incarnation}"
    return FIRST_PORT + zlib.crc32(text.encode()) % PORTS
