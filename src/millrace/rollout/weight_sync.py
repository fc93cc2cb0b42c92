"""Brings the trainer's weights to the engines and proves that they arrived.

    pause -> begin -> buckets -> finish -> reset prefix cache -> version -> resume -> verify

Always verified, on every worker of every engine: fingerprints of a rotating eighth of the tensors, that every parameter
got values, that parameters which the engine keeps as they came hold those values, and the log-probs of a probe prompt.
After a mismatch everything is sent once more with all fingerprints, to name the tensor. No engine serves unverified.
"""

from __future__ import annotations

import concurrent.futures
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from millrace.config.schema import FleetConfig
from millrace.data.batch import TokenBatch
from millrace.errors import MillraceError
from millrace.rollout.bandwidth import GB, Link, slowest_link
from millrace.rollout.fleet import Fleet
from millrace.rollout.receivers import EnginesLost, Receivers, WorkerReport
from millrace.rollout.rendezvous import Rendezvous
from millrace.rollout.transports import make_carrier, transport_folder
from millrace.rollout.transports.broadcast import BroadcastCarrier
from millrace.rollout.transports.buckets import Carrier, Feeder, Outbox, Sent, SyncError, clear
from millrace.rollout.transports.groups import call_meeting

T = TypeVar("T")

SAMPLE_PERIOD = 8
"""Every tensor's fingerprint is compared once in so many syncs."""
MAX_TRIES = 3
"""Syncs in a row that may lose all their engines."""
PROBE_TOKENS = tuple((7 * i * i + 3 * i + 11) % 199 for i in range(32))
"""The probe prompt: arbitrary fixed ids that are in every vocabulary."""
MOVING = ("begin", "send", "finish")
"""The phases of a sync that move weights; the others prepare it once or check it."""
SLOW_FACTOR, SLOW_SECONDS = 3.0, 1.0
"""A sync is called slow from so many times what the slowest link allows, and from so many seconds."""
NAMED = 5
"""So many tensors are named when more of them differ."""


class SyncMismatch(SyncError):
    """Engines do not compute what the trainer computes; the message names the tensor."""


class SyncedPolicy(Protocol):
    """What a weight sync asks of the trainer's policy."""

    def hf_tensors(self, *, few_owners: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The tensors that this rank owns, by checkpoint names; each holds still until the next. All ranks that hold a
        tensor take turns in owning some, or with `few_owners` only as few as have to. Collective."""

    def owned_bytes(self, *, few_owners: bool = False) -> int:
        """Bytes of those tensors."""

    def logprobs(self, batch: TokenBatch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """float32 [N] log-probs of the batch's tokens, on every rank. Collective."""


class Ranks(Protocol):
    """Where this process stands among the trainer's."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...


@dataclass(frozen=True)
class SyncReport:
    """One finished sync; the same on every rank."""

    version: int
    engines: int
    bytes: int
    tensors: int
    link: Link
    """The slowest link on the way to an engine."""
    seconds: float
    phases: dict[str, float]
    """Seconds of probe (the trainer's log-probs), begin, meet (groups for broadcasts), send, finish and verify."""
    fingerprints: int
    """Tensors whose fingerprints were compared."""
    held: int
    """Parameters that were read back from an engine."""
    probe_mean: float
    """Mean |log p_trainer - log p_engine| over the probe prompt, on the engine where it was largest."""
    probe_max: float

    @property
    def moved_seconds(self) -> float:
        """Seconds from the first preparation of the engines to the last weight in its place."""
        return sum(self.phases[phase] for phase in MOVING)

    @property
    def link_seconds(self) -> float:
        """Seconds that the slowest link needs for the bytes."""
        return self.link.seconds(self.bytes)

    @property
    def slow(self) -> bool:
        """Whether that is far from what the link allows, and long enough to matter."""
        return self.moved_seconds > max(SLOW_SECONDS, SLOW_FACTOR * self.link_seconds)

    def __str__(self) -> str:
        gigabytes = self.bytes / GB
        said = (
            f"sync: {gigabytes:.3g} GB in {self.moved_seconds:.2g} s, {gigabytes / self.moved_seconds:.2g} GB/s; the "
            f"slowest link ({self.link.name}, {self.link.gb_s:.3g} GB/s) would allow {self.link_seconds:.2g} s"
        )
        slowest = max(MOVING, key=lambda phase: self.phases[phase])
        return f"{said}; this is slow: {self.phases[slowest]:.2g} s of it went to {slowest}" if self.slow else said

    def metrics(self) -> dict[str, float]:
        return {
            "sync/gigabytes": self.bytes / GB,
            "sync/seconds": self.moved_seconds,
            "sync/link_seconds": self.link_seconds,
        }


@dataclass(frozen=True)
class _Verdict:
    report: SyncReport | None = None
    mismatch: str = ""


class WeightSync:
    """Collective over all trainer ranks; `fleet` is rank 0's and None elsewhere.

    group: for the messages between ranks, which may wait for engines; the default group when absent.
    carrier: how this rank's buckets travel, instead of what `config.transport` says.
    """

    def __init__(
        self,
        policy: SyncedPolicy,
        fleet: Fleet | None,
        config: FleetConfig,
        topology: Ranks,
        *,
        group: dist.ProcessGroup | None = None,
        carrier: Carrier | None = None,
        probe_tokens: Sequence[int] = PROBE_TOKENS,
    ) -> None:
        self.version: int | None = None
        """What was last pushed."""
        self._policy, self._fleet, self._config = policy, fleet, config
        self._group = group
        self._rank, self._world = topology.rank, topology.world
        self._probe = tuple(probe_tokens)
        self._folder = Path(self._on_main(lambda fleet: str(transport_folder(config, fleet.run_dir))))
        self._carrier = carrier or make_carrier(config, self._folder, self._rank)
        self._met: object = None
        """Lives of the engines that the groups for broadcasts were built with."""
        self._link_measured: Link | None = None
        self._feeding: concurrent.futures.Future[None] | None = None
        self._phases: dict[str, float] = {}

    def push(self, version: int) -> SyncReport:
        """Give every engine the policy's present weights as `version`. Raises SyncMismatch, SyncError on every rank."""
        report = self._push(version, only_unsynced=False)
        assert report is not None
        return report

    def forget(self) -> None:
        """Let the next push happen whatever its version: the policy was given other weights without an update."""
        self.version = None

    def let_engines_sleep(self) -> None:
        """Free the GPU memory of engines that share it with the trainer, where they do, until the next push.
        Collective."""
        if self._config.sleep != "never":
            self._on_main(lambda fleet: fleet.call(fleet.sleep()))
            self.forget()

    def resync_if_needed(self) -> SyncReport | None:
        """Give engines that were restarted the last pushed version, while the others go on serving.

        To be called where all ranks are, while the policy still has the weights of that version.
        """
        return None if self.version is None else self._push(self.version, only_unsynced=True)

    def _push(self, version: int, *, only_unsynced: bool) -> SyncReport | None:
        first_mismatch = ""
        for _ in range(MAX_TRIES):
            if only_unsynced and not self._on_main(lambda fleet: fleet.needs_sync):
                return None
            verdict = self._push_once(version, only_unsynced, check_all=bool(first_mismatch))
            if first_mismatch and verdict.mismatch:
                raise SyncMismatch(verdict.mismatch)
            if first_mismatch and verdict.report is not None:
                raise SyncMismatch(
                    f"{first_mismatch}. Sent again and compared in full it was right: the fault comes and goes"
                )
            first_mismatch = first_mismatch or verdict.mismatch
            if verdict.report is not None:
                self.version = version
                return verdict.report
        raise SyncError(f"no engine lived through {MAX_TRIES} weight syncs in a row; their logs say why")

    def _push_once(self, version: int, only_unsynced: bool, *, check_all: bool) -> _Verdict:
        self._phases = {}
        sampled = _sampler(version, check_all)
        batch = TokenBatch.from_sequences([self._probe])
        with self._phase("probe"):
            expected = self._policy.logprobs(batch, temperature=1.0)[0].tolist()
        self._make_room()
        with self._phase("begin"):
            if not self._on_main(lambda fleet: self._begin(fleet, sampled, only_unsynced)):
                return _Verdict()
        try:
            with self._phase("meet"):
                lives = self._meet()
        except EnginesLost:
            return _Verdict()
        with self._phase("send"):
            sent = self._gather(self._send(sampled))
        verdict = self._on_main(lambda fleet: self._conclude(fleet, version, sent, expected))
        self._met = lives if verdict.report else None
        return verdict

    def _make_room(self) -> None:
        """Where engines slept on this GPU and wake up now, give back what the allocator keeps of the training's memory.
        Collective."""
        if self._config.sleep != "never":
            torch.cuda.empty_cache()
            self._gather(self._rank)

    def _meet(self) -> object:
        """Build the groups that buckets are broadcast in, where they are, when the engines are others than before; the
        lives of the engines that are in them."""
        if not isinstance(self._carrier, BroadcastCarrier):
            return None
        lives, workers = self._on_main(lambda fleet: self._receivers.lives_and_workers())
        met, self._met = self._met, None  # unless all goes well: what breaks off leaves the groups useless
        if lives == met:
            return lives
        sends = self._policy.owned_bytes(few_owners=self._carrier.few_senders) > 0
        meeting = call_meeting(self._carrier.kind, self._rank, workers, [url for url, _ in lives]) if sends else None
        meetings = [one for (one,) in self._gather((meeting,)) if one is not None]
        joining = self._fleet.begin(self._receivers.meet(meetings)) if self._fleet else None
        problems = self._gather(self._carrier.meet(meeting))
        self._on_main(lambda fleet: self._finish_together(joining, problems))
        return lives

    def _send(self, sampled: Callable[[str], bool]) -> Sent:
        outbox = Outbox(
            self._folder,
            self._rank,
            self._carrier,
            bucket_bytes=self._config.bucket_bytes,
            limit=self._config.request_timeout_s,
            sampled=sampled,
        )
        feeding = self._fleet.begin(self._feeder.run()) if self._fleet else None
        try:
            sent = outbox.send(self._policy.hf_tensors(few_owners=self._carrier.few_senders))
            self._feeding = feeding
            return sent
        finally:
            self._carrier.close()

    # ---- rank 0 ---------------------------------------------------------------------------------------------------

    def _begin(self, fleet: Fleet, sampled: Callable[[str], bool], only_unsynced: bool) -> bool:
        """Whether there is an engine that is ready to take weights."""
        clear(self._folder)
        members = fleet.call(fleet.begin_sync(only_unsynced=only_unsynced))
        self._receivers = Receivers(members, fleet.report, sampled, self._config.request_timeout_s)
        self._feeder = Feeder(self._folder, self._world, self._receivers.load, self._config.request_timeout_s)
        try:
            fleet.call(self._receivers.begin())
        except EnginesLost:
            return False
        return True

    def _conclude(self, fleet: Fleet, version: int, sent: list[Sent], expected: list[float]) -> _Verdict:
        try:
            return self._verify(fleet, version, sent, expected)
        except EnginesLost:
            return _Verdict()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _verify(self, fleet: Fleet, version: int, sent: list[Sent], expected: list[float]) -> _Verdict:
        receivers = self._receivers
        self._finish_together(self._feeding, [rank.problem for rank in sent])
        with self._phase("finish"):
            fleet.call(receivers.finish(version))
        with self._phase("verify"):
            probes = fleet.call(receivers.probe(self._probe))
        workers = {member.engine.name: receivers.workers[member.engine.index] for member in receivers.members}
        fingerprints = {name: value for rank in sent for name, value in rank.fingerprints.items()}
        differences = [_differences(expected, probes[member.engine.index]) for member in receivers.members]
        means = {name: sum(d) / len(d) for name, d in zip(workers, differences, strict=True)}
        if mismatch := _mismatch(fingerprints, workers, means, self._config.probe_tolerance):
            return _Verdict(mismatch=f"weights of version {version}: {mismatch}")
        fleet.call(fleet.end_sync(receivers.members, version))
        report = SyncReport(
            version=version,
            engines=len(receivers.members),
            bytes=sum(rank.bytes for rank in sent),
            tensors=sum(rank.tensors for rank in sent),
            link=self._link,
            seconds=sum(self._phases.values()),
            phases=dict(self._phases),
            fingerprints=len(fingerprints),
            held=sum(worker.held for reports in workers.values() for worker in reports),
            probe_mean=max(means.values()),
            probe_max=max(max(d) for d in differences),
        )
        return _Verdict(report=report)

    def _finish_together(self, work: concurrent.futures.Future[None] | None, problems: Sequence[str]) -> None:
        """Wait for what the engines do while the ranks do their part, which is where `problems` are from.

        Raises EnginesLost where an engine died: a broadcast ends for those that live as well, and for the ranks.
        """
        assert work is not None
        try:
            work.result()
            if any(problems):
                raise SyncError("; ".join(filter(None, problems)))
        except SyncError as error:
            if self._receivers.lost:
                raise EnginesLost(str(error)) from error
            raise

    @property
    def _link(self) -> Link:
        if self._link_measured is None:
            self._link_measured = slowest_link(self._config, self._folder, Rendezvous.of_environment())
        return self._link_measured

    # ---- between ranks --------------------------------------------------------------------------------------------

    def _on_main(self, work: Callable[[Fleet], T]) -> T:
        """Let rank 0 do something; its result, or its error, is every rank's. Collective."""
        outcome: list[T | MillraceError | None] = [None]
        if self._rank == 0:
            assert self._fleet is not None, "rank 0 of the trainer holds the fleet"
            try:
                outcome = [work(self._fleet)]
            except MillraceError as error:
                outcome = [error]
        if self._world > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], MillraceError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    def _gather(self, own: T) -> list[T]:
        """What every rank has, in the order of the ranks. Collective."""
        if self._world == 1:
            return [own]
        gathered: list[T | None] = [None] * self._world
        dist.all_gather_object(gathered, own, group=self._group)
        return [one for one in gathered if one is not None]

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._phases[name] = time.monotonic() - began


def _sampler(version: int, check_all: bool) -> Callable[[str], bool]:
    """Which tensors' fingerprints are compared at this version: another eighth each time, or all."""
    if check_all:
        return lambda name: True
    return lambda name: (zlib.crc32(name.encode()) + version) % SAMPLE_PERIOD == 0


def _differences(expected: Sequence[float], probed: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(expected[1:], probed[1:], strict=True)]


def _mismatch(
    fingerprints: Mapping[str, int],
    workers: Mapping[str, Sequence[WorkerReport]],
    means: Mapping[str, float],
    tolerance: float,
) -> str:
    """What is wrong, in a sentence, or nothing."""
    for engine, reports in workers.items():
        for report in reports:
            if wrong := [name for name, value in fingerprints.items() if report.received.get(name) != value]:
                return f"{_names(wrong)} did not arrive at {engine} as sent (fingerprints differ)"
            if report.missing:
                return f"{engine} got no values, or not all, for {_names(report.missing)}"
            if report.changed:
                return f"{_names(report.changed)} arrived right but {engine} holds other values"
    for engine, mean in means.items():
        if not mean <= tolerance:  # not a number is a mismatch too
            return (
                f"log-probs of the probe prompt differ between trainer and {engine} by {mean:.3g} on average, more "
                f"than fleet.probe_tolerance = {tolerance:g}; {len(fingerprints)} compared tensors arrived as sent, so "
                "the difference lies in what the engine makes of them (or in the trainer's own forward pass)"
            )
    return ""


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(sorted(names)[:NAMED]) + more
