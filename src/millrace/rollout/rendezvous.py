"""Where the nodes of one job meet: a folder on the disk they share.

Each node says there where it is and that it lives; what a job ends with and what it failed of stand there once. A job
that is started again meets in another folder, RUN_DIR/launch/JOB.RESTART, so that nothing old is taken for new. Files
are put in place whole, and only their owner reads them. Imports neither torch nor vLLM.

    node-N.json     `NodeState`, written anew at every beat
    token           what every vLLM server of the job asks for
    servers/        what is wanted of each server, and how it is (`remote`, `agent`)
    failure.json    `Failure`: the first component that failed, and why; there is never a second one
    ending.json     the exit code of the run on rank 0
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.config.cluster import NetworkConfig
from millrace.config.placement import Placement, read_placement

LAUNCH_FOLDER = "launch"
PLACEMENT = "placement.json"
NETWORK = "network.json"
RENDEZVOUS_VARIABLE = "MILLRACE_RENDEZVOUS"
"""Names the folder to the ranks of a job; unset where a run has one machine."""
SILENT_SECONDS = 60.0
"""A node that gives no sign of life for so long is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class NodeState:
    node: int
    host: str
    address: str = ""
    """Where the other nodes reach it; empty on one that failed before it knew."""
    port: int = 0
    """Where the trainer's ranks meet, if this is node 0."""
    beat: int = 0
    """Counts up as long as the node lives: clocks of nodes are not compared."""
    ended: bool = False
    """All that it started has ended."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    node: int
    host: str
    component: str
    """`trainer`, `servers` or `launch`; empty for the node itself."""
    reason: str
    """One sentence."""
    last_lines: str = ""
    """The end of the component's log."""
    time: float = dataclasses.field(default_factory=time.time)

    def __str__(self) -> str:
        what = f", {self.component}" if self.component else ""
        said = f"node {self.node} ({self.host}){what}: {self.reason}"
        return f"{said}\n{self.last_lines}" if self.last_lines else said


class Rendezvous:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers = folder / "servers"

    @classmethod
    def of_environment(cls) -> Rendezvous | None:
        """That of the job this process is a rank of; None where a run has one machine."""
        folder = os.environ.get(RENDEZVOUS_VARIABLE)
        return cls(Path(folder)) if folder else None

    def open(self) -> None:
        """Make the folder, for its owner alone; any node may be the first."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.servers.mkdir(mode=0o700, exist_ok=True)

    @property
    def placement(self) -> Placement:
        return read_placement(self.folder.parent / PLACEMENT)

    @property
    def network(self) -> NetworkConfig:
        """The links that the cluster file tells of."""
        return NetworkConfig(**read_json(self.folder.parent / NETWORK))

    # ---- nodes

    def announce(self, state: NodeState) -> None:
        write_json(self.folder / f"node-{state.node}.json", dataclasses.asdict(state))

    def node(self, number: int) -> NodeState | None:
        """What a node last said of itself; None before it has come."""
        facts = read_json(self.folder / f"node-{number}.json")
        return NodeState(**facts) if facts else None

    # ---- the token

    def make_token(self) -> None:
        """Called once, by node 0, before it announces itself."""
        descriptor = os.open(self.folder / "token", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(32))

    def token(self) -> str:
        return (self.folder / "token").read_text(encoding="utf-8")

    # ---- how it ends

    def fail(self, failure: Failure) -> bool:
        """Put a failure on record, unless there is one; whether this is the one."""
        aside = _aside(self.folder / "failure.json")
        aside.write_text(json.dumps(dataclasses.asdict(failure), indent=2) + "\n", encoding="utf-8")
        try:
            os.link(aside, self.folder / "failure.json")  # fails where the name is taken, unlike a rename
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def failure(self) -> Failure | None:
        facts = read_json(self.folder / "failure.json")
        return Failure(**facts) if facts else None

    def end(self, code: int) -> None:
        write_json(self.folder / "ending.json", {"code": code})

    def ending(self) -> int | None:
        """The exit code of the run on rank 0; None while it runs."""
        facts = read_json(self.folder / "ending.json")
        return facts["code"] if facts else None

    @property
    def over(self) -> bool:
        """Whether the job has ended or failed."""
        return (self.folder / "ending.json").exists() or (self.folder / "failure.json").exists()


class Pulse:
    """Tells how long nodes have been silent: since their beat last changed, by the clock of who asks."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, float]] = {}

    def silent_for(self, state: NodeState, now: float) -> float:
        """Seconds since the node's last sign of life that was seen here. now: `time.monotonic()`."""
        beat, since = self._last.get(state.node, (None, now))
        if beat != state.beat:
            self._last[state.node] = (state.beat, now)
            return 0.0
        return now - since


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Put a file in place whole."""
    aside = _aside(path)
    aside.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    """The facts of a file; none where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}")
