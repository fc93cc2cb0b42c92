"""One engine as the fleet sees it: its process, its health, what it is working on."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from millrace.errors import MillraceError
from millrace.rollout.client import EngineClient
from millrace.rollout.engine import EngineProcess, ExternalEngine
from millrace.rollout.fleet_health import EngineHealth, State
from millrace.rollout.remote import RemoteEngine

Engine = EngineProcess | ExternalEngine | RemoteEngine
"""A server on this machine, one that somebody else started, or one on another node of the job."""


class FleetError(MillraceError):
    """The fleet cannot do what it was asked for."""


class FleetNeedsSync(FleetError):
    """No engine holds weights that may be sampled from; what was already answered is kept for the next call."""


class FleetLost(FleetError):
    """Every engine gave up."""


@dataclass
class Member:
    engine: Engine
    client: EngineClient
    health: EngineHealth = field(default_factory=EngineHealth)
    tasks: set[asyncio.Task[object]] = field(default_factory=set)
    """Requests under way; cancelled when the engine dies."""
    outstanding: int = 0
    """Sequences under way."""
    spawned_at: float = field(default_factory=time.monotonic)
    progressed_at: float = field(default_factory=time.monotonic)
    """When the last request came back."""

    @property
    def serving(self) -> bool:
        return self.health.state is State.SERVING

    @property
    def coming_up(self) -> bool:
        return self.health.state in (State.STARTING, State.DEAD, State.RESTARTING)

    @property
    def unsynced(self) -> bool:
        """Answers, and waits for a weight sync."""
        return self.health.state in (State.READY, State.STALE)
