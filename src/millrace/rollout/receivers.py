"""The engines that take part in one weight sync, as rank 0 drives them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from millrace.rollout.client import EngineClient, EngineFailed, EngineUnreachable, RequestRefused, RequestTimeout
from millrace.rollout.fleet_health import Suspected
from millrace.rollout.member import Member
from millrace.rollout.transports.buckets import SyncError
from millrace.rollout.transports.groups import Meeting, rank_offsets

T = TypeVar("T")

NOT_A_NUMBER = "float values are not JSON compliant"
"""How a server refuses to answer with log-probs that are not numbers, as broken weights give them."""


class EnginesLost(SyncError):
    """Engines died in a sync: all of them, or one whose part in a broadcast the others wait for. A sync with those that
    are left or come back may work."""


@dataclass
class WorkerReport:
    """What one worker of an engine says about what it got."""

    received: dict[str, int] = field(default_factory=dict)
    """Fingerprints of the sampled tensors as they arrived."""
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    held: int = 0


class Receivers:
    """Runs in the fleet's thread. An engine that dies is left out; EnginesLost when it was the last one."""

    def __init__(
        self,
        members: Sequence[Member],
        report: Callable[[Member, Suspected], None],
        sampled: Callable[[str], bool],
        limit: float,
    ) -> None:
        self.members = list(members)
        self.workers: dict[int, list[WorkerReport]] = {}
        """Reports of each engine's workers, by the engine's index."""
        self.lost = False
        """Whether one died on the way."""
        self._report, self._sampled, self._limit = report, sampled, limit

    async def begin(self) -> None:
        """Freeze what the engines are doing and get them ready for new weights; one that sleeps has no cache yet."""

        async def begin(client: EngineClient) -> int:
            await client.wake("weights", self._limit)
            await client.pause()
            return len(await client.worker_call("millrace_begin", limit=self._limit))

        for member, workers in (await self._each(begin)).items():
            self.workers[member] = [WorkerReport() for _ in range(workers)]

    def lives_and_workers(self) -> tuple[list[tuple[str, int]], int]:
        """Which life of which engines takes part, by their URLs, and how many workers they have together."""
        lives = [(member.client.url, member.health.restarts) for member in self.members]
        return lives, sum(len(self.workers[member.engine.index]) for member in self.members)

    async def meet(self, meetings: Sequence[Meeting]) -> None:
        """Let the workers of all engines part from the groups they had and join that of each trainer rank."""
        await self._each(lambda client: client.worker_call("millrace_part", limit=self._limit))
        counts = [len(self.workers[member.engine.index]) for member in self.members]
        offsets = dict(zip((member.client for member in self.members), rank_offsets(counts), strict=True))
        for meeting in meetings:
            where = json.dumps(asdict(meeting))
            await self._each(
                lambda client, where=where: client.worker_call(  # type: ignore[misc]
                    "millrace_meet", where, str(offsets[client]), f"{self._limit:g}", limit=self._limit
                )
            )

    async def load(self, indexes: Sequence[Path], names: Sequence[str]) -> None:
        """Let every engine load a few buckets, which hold these tensors."""
        shown = json.dumps([str(index) for index in indexes])
        sampled = json.dumps([name for name in names if self._sampled(name)])
        replies = await self._each(
            lambda client: client.worker_call("millrace_load", shown, sampled, limit=self._limit)
        )
        for member, workers in replies.items():
            for report, reply in zip(self.workers[member], workers, strict=True):
                report.received |= reply["received"]

    async def finish(self, version: int) -> None:
        """Put the new weights into service: nothing computed with the old ones is kept."""

        async def finish(client: EngineClient) -> list[Any]:
            workers = await client.worker_call("millrace_finish", limit=self._limit)
            await client.wake("kv_cache", self._limit)  # the sender's buckets are gone by now
            await client.reset_prefix_cache()
            await client.set_weight_version(version)
            await client.resume()
            return workers

        for member, workers in (await self._each(finish)).items():
            for report, reply in zip(self.workers[member], workers, strict=True):
                report.missing, report.changed, report.held = reply["missing"], reply["changed"], reply["held"]

    async def probe(self, tokens: tuple[int, ...]) -> dict[int, list[float]]:
        """Log-probs of a prompt on each engine, by the engine's index; not-a-number where it computes none."""

        async def probe(client: EngineClient) -> list[float]:
            try:
                return await client.prompt_logprobs(tokens, self._limit)
            except RequestRefused as error:
                if NOT_A_NUMBER not in str(error):
                    raise
                return [math.nan] * len(tokens)

        return await self._each(probe)

    async def _each(self, call: Callable[[EngineClient], Awaitable[T]]) -> dict[int, T]:
        answers = await asyncio.gather(*(self._ask(member, call) for member in self.members))
        kept = {member.engine.index: answer[0] for member, answer in zip(self.members, answers, strict=True) if answer}
        self.members = [member for member in self.members if member.engine.index in kept]
        if not self.members:
            raise EnginesLost("every engine died while it took weights")
        return kept

    async def _ask(self, member: Member, call: Callable[[EngineClient], Awaitable[T]]) -> tuple[T] | None:
        """What the engine answers, or None when it is gone."""
        try:
            return (await call(member.client),)
        except EngineFailed as error:
            if await member.client.healthy(self._limit):  # it lives and says that it cannot
                raise SyncError(f"{member.engine.name} could not take the weights: {error}") from error
        except (EngineUnreachable, RequestTimeout):
            pass
        self._report(member, Suspected())
        self.lost = True
        return None
