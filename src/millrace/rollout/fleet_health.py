"""The life of one engine as a pure state machine: what happened goes in, the new state and what to do come out.

    starting ----answers----> ready ----sync ended----> serving <---> silent
        |                       ^                          |             |
      exits                     | (a fresh engine holds    |  exits, or three probes unanswered, or overdue
        v                       |  the start checkpoint)   v             v
     gave_up <--too many-- dead --respawned--> restarting --answers--> stale --sync ended--> serving

An engine that was restarted holds the weights of the start checkpoint. It never serves again before a weight sync that
began after the restart has ended: that is the one rule this file exists for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

MISSES_UNTIL_DEAD = 3


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    """Answers, and holds the checkpoint it was started with."""
    SERVING = "serving"
    """Holds the weights of `version` and takes requests."""
    SILENT = "silent"
    """Missed a health probe; takes no new requests."""
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    """Answers, but holds weights that nobody vouches for."""
    GAVE_UP = "gave_up"


class Action(StrEnum):
    REQUEUE = "requeue"
    """Take its outstanding prompts back."""
    RESTART = "restart"
    STOP = "stop"


@dataclass(frozen=True)
class Answered:
    """A health probe was answered."""


@dataclass(frozen=True)
class Missed:
    """A health probe was not answered in time."""


@dataclass(frozen=True)
class Suspected:
    """A request broke off. Many do at one time, so the next health probe decides."""


@dataclass(frozen=True)
class Exited:
    """The process ended."""

    code: int


@dataclass(frozen=True)
class Overdue:
    """Something with a limit took longer: the start, or requests none of which came back."""

    what: str


@dataclass(frozen=True)
class Respawned:
    """A new process was started in place of the dead one."""


@dataclass(frozen=True)
class SyncBegan:
    """Its weights are being overwritten."""


@dataclass(frozen=True)
class SyncEnded:
    """All weights of `version` have arrived and were checked."""

    version: int


Event = Answered | Missed | Suspected | Exited | Overdue | Respawned | SyncBegan | SyncEnded


@dataclass(frozen=True)
class EngineHealth:
    state: State = State.STARTING
    missed: int = 0
    """Health probes unanswered in a row."""
    restarts: int = 0
    version: int | None = None
    """Weights it serves with."""
    syncing: bool = False
    """A weight sync that began in this life of the process has not ended."""
    before_silence: State = State.READY
    """Where a silent engine goes back to when it answers."""
    reason: str = ""
    """Why it last died."""


@dataclass(frozen=True)
class Step:
    health: EngineHealth
    actions: tuple[Action, ...] = ()


_ANSWERING = (State.READY, State.SERVING, State.STALE)


def step(health: EngineHealth, event: Event, *, max_restarts: int) -> Step:
    """Where `event` takes an engine, and what is to be done about it."""
    if health.state is State.GAVE_UP:
        return Step(health)
    match event:
        case Answered():
            return Step(_answered(health))
        case Missed():
            return _missed(health, max_restarts)
        case Suspected():
            return Step(_silenced(health))
        case Exited(code):
            return _died(health, f"its process ended with status {code}", max_restarts)
        case Overdue(what):
            return _died(health, what, max_restarts)
        case Respawned():
            return Step(replace(health, state=State.RESTARTING, restarts=health.restarts + 1, missed=0))
        case SyncBegan():
            return Step(_sync_began(health))
        case SyncEnded(version):
            return Step(_sync_ended(health, version))


def _answered(health: EngineHealth) -> EngineHealth:
    after = {
        State.STARTING: State.READY,
        State.RESTARTING: State.STALE,
        State.SILENT: health.before_silence,
    }.get(health.state, health.state)
    return replace(health, state=after, missed=0)


def _missed(health: EngineHealth, max_restarts: int) -> Step:
    if health.state not in (*_ANSWERING, State.SILENT):
        return Step(health)  # an engine that is starting answers when it is up; its limit is the start's
    missed = health.missed + 1
    if missed >= MISSES_UNTIL_DEAD:
        return _died(health, f"{missed} health probes in a row were not answered", max_restarts)
    return Step(replace(_silenced(health), missed=missed))


def _silenced(health: EngineHealth) -> EngineHealth:
    if health.state not in _ANSWERING:
        return health
    return replace(health, state=State.SILENT, before_silence=health.state)


def _died(health: EngineHealth, reason: str, max_restarts: int) -> Step:
    if health.state is State.DEAD:
        return Step(health)
    # One that never answered would fail the same way again: a wrong argument, a missing library, too little memory.
    hopeless = health.state is State.STARTING or health.restarts >= max_restarts
    state = State.GAVE_UP if hopeless else State.DEAD
    dead = replace(health, state=state, syncing=False, version=None, missed=0, reason=reason)
    return Step(dead, (Action.REQUEUE, Action.STOP if hopeless else Action.RESTART))


def _sync_began(health: EngineHealth) -> EngineHealth:
    if health.state in _ANSWERING:
        return replace(health, state=State.STALE, syncing=True, version=None)
    if health.state is State.SILENT:
        return replace(health, before_silence=State.STALE, syncing=True, version=None)
    return health


def _sync_ended(health: EngineHealth, version: int) -> EngineHealth:
    if not health.syncing:  # it died on the way: what was sent went to the process before
        return health
    synced = replace(health, syncing=False, version=version)
    if health.state is State.SILENT:
        return replace(synced, before_silence=State.SERVING)
    return replace(synced, state=State.SERVING)
