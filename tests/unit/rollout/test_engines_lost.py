"""Engines that die in a weight sync by broadcasts: real gloo groups and the whole sync, between threads.

Only the engines are stand-ins, for a real one cannot be made to die at a chosen moment of its own meeting.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Collection, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.config.schema import FleetConfig
from millrace.converters.fingerprint import fingerprint
from millrace.rollout.client import EngineFailed, EngineUnreachable
from millrace.rollout.transports.arrival import BucketReader
from millrace.rollout.transports.broadcast import BroadcastCarrier
from millrace.rollout.transports.groups import GlooGroup, Meeting
from millrace.rollout.weight_sync import WeightSync

LIMIT = 2.0
CONFIG = FleetConfig(transport="gloo", request_timeout_s=LIMIT, bucket_bytes=1000)
TENSORS = {f"t{n}": torch.full((100,), float(n)) for n in range(12)}


class Engine:
    """One worker, and what `EngineClient` says of it."""

    def __init__(self, index: int, dies_at: str = "") -> None:
        self.url, self.asleep, self.dead = f"http://127.0.0.1:{index}", False, False
        self.dies_at = dies_at
        self.reader = BucketReader(torch.device("cpu"))
        self.held: dict[str, Tensor] = {}

    async def healthy(self, limit: float) -> bool:
        return not self.dead

    async def _nothing(self, *arguments: Any) -> None: ...

    wake = pause = resume = reset_prefix_cache = set_weight_version = _nothing

    async def prompt_logprobs(self, tokens: Collection[int], limit: float) -> list[float]:
        return [0.0] * len(tokens)

    async def worker_call(self, method: str, *arguments: str, limit: float) -> list[Any]:
        if method == self.dies_at:
            self.dead = True
            self.millrace_part()
        if self.dead:
            raise EngineUnreachable("it is gone")
        try:
            return [await asyncio.to_thread(getattr(self, method), *arguments)]
        except RuntimeError as error:
            raise EngineFailed(str(error)) from error

    def millrace_begin(self) -> dict[str, Any]:
        self.held = {}
        return {}

    def millrace_part(self) -> dict[str, Any]:
        while self.reader.senders:
            self.reader.senders.popitem()[1].close()
        return {}

    def millrace_meet(self, meeting: str, offset: str, limit: str) -> dict[str, Any]:
        where = Meeting(**json.loads(meeting))
        self.reader.senders[where.rank] = GlooGroup(where, int(offset), float(limit))
        return {}

    def millrace_load(self, indexes: str, sampled: str) -> dict[str, Any]:
        for bucket in self.reader.read([Path(index) for index in json.loads(indexes)]):
            self.held |= {name: tensor.clone() for name, tensor in bucket.items()}
        return {"received": {name: fingerprint(self.held[name]) for name in json.loads(sampled)}}

    def millrace_finish(self) -> dict[str, Any]:
        return {"missing": [], "changed": [], "held": 0}


class Engines:
    """What a sync asks of the fleet."""

    needs_sync = True

    def __init__(self, engines: list[Engine], run_dir: Path) -> None:
        self.run_dir = run_dir
        self.members = [
            SimpleNamespace(
                client=engine, engine=SimpleNamespace(name=f"engine {n}", index=n), health=SimpleNamespace(restarts=0)
            )
            for n, engine in enumerate(engines)
        ]
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.begin(work).result()

    async def begin_sync(self, *, only_unsynced: bool) -> list[Any]:
        return [member for member in self.members if not member.client.dead]

    async def end_sync(self, members: Collection[Any], version: int) -> None: ...

    def report(self, member: Any, event: Any) -> None: ...


class Weights:
    def hf_tensors(self, *, few_owners: bool = False) -> Iterator[tuple[str, Tensor]]:
        return iter(TENSORS.items())

    def owned_bytes(self, *, few_owners: bool = False) -> int:
        return sum(tensor.nbytes for tensor in TENSORS.values())

    def logprobs(self, batch: Any, *, temperature: float = 1.0) -> tuple[Tensor, None]:
        return torch.zeros(batch.tokens.numel()), None


@pytest.mark.parametrize("moment", ["millrace_meet", "millrace_load"])
def test_an_engine_that_dies_takes_no_other_one_with_it(moment: str, tmp_path: Path) -> None:
    """Also not where those that live are the ones of the sync before, whose group is gone by then."""
    engines = [Engine(0), Engine(1)]
    engines[1].dead = True
    carrier = BroadcastCarrier("gloo", 0, CONFIG.bucket_bytes, LIMIT)
    fleet: Any = Engines(engines, tmp_path)
    sync = WeightSync(Weights(), fleet, CONFIG, SimpleNamespace(rank=0, world=1), carrier=carrier)
    assert sync.push(1).engines == 1
    engines[1].dead, engines[1].dies_at = False, moment
    report = sync.push(2)
    assert (report.engines, report.version, engines[1].dead) == (1, 2, True)
    assert engines[0].held.keys() == TENSORS.keys()
    assert all(torch.equal(engines[0].held[name], tensor) for name, tensor in TENSORS.items())
