"""Real gloo groups between threads: two trainer ranks that send at the same time, three workers that take."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millrace.rollout.transports.arrival import BucketReader
from millrace.rollout.transports.broadcast import BroadcastCarrier
from millrace.rollout.transports.buckets import Feeder, Outbox, Sent, clear
from millrace.rollout.transports.groups import GlooGroup, address_towards, call_meeting, within

BUCKET_BYTES = 4000
Load = Callable[[list[Path], list[str]], Awaitable[None]]
WORKERS = 3
LIMIT = 3.0


def own_tensors(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {f"{rank}.{n}": torch.randn(3 + 40 * n, 5, generator=generator) for n in range(9)}


def meet(carriers: list[BroadcastCarrier], readers: list[BucketReader]) -> None:
    """Let each sending rank and all workers build its group."""
    meetings = [call_meeting("gloo", rank, len(readers), ["http://127.0.0.1:1"]) for rank in range(len(carriers))]
    with ThreadPoolExecutor(1 + len(readers)) as pool:
        for carrier, meeting in zip(carriers, meetings, strict=True):
            joining = [pool.submit(GlooGroup, meeting, 1 + n, LIMIT) for n in range(len(readers))]
            assert carrier.meet(meeting) == ""
            for reader, group in zip(readers, joining, strict=True):
                reader.senders[meeting.rank] = group.result()


def test_what_ranks_broadcast_at_the_same_time_arrives_bitwise_at_every_worker(tmp_path: Path) -> None:
    carriers = [BroadcastCarrier("gloo", rank, BUCKET_BYTES, LIMIT) for rank in range(2)]
    readers = [BucketReader(torch.device("cpu")) for _ in range(WORKERS)]
    meet(carriers, readers)
    arrived: list[dict[str, Tensor]] = [{} for _ in readers]
    together: list[set[str]] = []

    def take(worker: int, indexes: list[Path]) -> None:
        for bucket in readers[worker].read(indexes):
            arrived[worker].update({name: tensor.clone() for name, tensor in bucket.items()})

    async def load(indexes: list[Path], names: list[str]) -> None:
        together.append({index.name.partition("-")[0] for index in indexes})
        await asyncio.gather(*(asyncio.to_thread(take, worker, indexes) for worker in range(WORKERS)))

    for _ in range(2):  # the groups serve one sync after the other
        sent: list[Sent] = []
        exchange(tmp_path / "b", carriers, load, sent)
        expected = {**own_tensors(0), **own_tensors(1)}
        for tensors in arrived:
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
            tensors.clear()
        assert [one.problem for one in sent] == ["", ""]
    assert {"00000", "00001"} in together, "buckets of both ranks are on their way at the same time"


def exchange(folder: Path, carriers: list[BroadcastCarrier], load: Load, sent: list[Sent]) -> None:
    """Let every rank send its tensors; what each says of it is added to `sent`."""
    clear(folder)

    def send(rank: int) -> None:
        outbox = Outbox(folder, rank, carriers[rank], bucket_bytes=BUCKET_BYTES, limit=20, sampled=lambda name: False)
        sent.append(outbox.send(own_tensors(rank).items()))
        carriers[rank].close()

    threads = [threading.Thread(target=send, args=(rank,)) for rank in range(len(carriers))]
    for thread in threads:
        thread.start()
    try:
        asyncio.run(Feeder(folder, len(carriers), load, limit=20).run())
    finally:
        for thread in threads:
            thread.join()


def test_a_worker_that_is_gone_is_noticed_and_nobody_hangs(tmp_path: Path) -> None:
    carriers = [BroadcastCarrier("gloo", 0, BUCKET_BYTES, LIMIT)]
    readers = [BucketReader(torch.device("cpu")) for _ in range(2)]
    meet(carriers, readers)
    readers[0].senders.pop(0).close()

    async def load(indexes: list[Path], names: list[str]) -> None:
        await asyncio.to_thread(lambda: list(readers[1].read(indexes)))

    began = time.monotonic()
    sent: list[Sent] = []
    with pytest.raises(RuntimeError):
        exchange(tmp_path / "b", carriers, load, sent)
    assert time.monotonic() - began < 4 * LIMIT
    assert sent[0].problem.startswith("rank 0 could not send weights: ")

    sent.clear()
    meet(carriers, readers[1:])  # without the one that is gone
    exchange(tmp_path / "b", carriers, load, sent)
    assert [one.problem for one in sent] == [""]


def test_a_rank_whom_nobody_meets_says_where_it_waited() -> None:
    meeting = call_meeting("gloo", 3, 1, ["http://127.0.0.1:1"])
    problem = BroadcastCarrier("gloo", 3, BUCKET_BYTES, 0.5).meet(meeting)
    assert f"rank 3 did not meet the engines at 127.0.0.1:{meeting.port}" in problem


def test_what_has_no_time_limit_of_its_own_gets_one_and_stays_in_its_own_thread() -> None:
    """As NCCL, which waits for ever, and vLLM, which changes the CUDA stream of the thread that it runs in."""
    for_ever = threading.Event()
    with pytest.raises(TimeoutError, match=r"not done within 0\.05 s"):
        within(0.05, for_ever.wait)
    for_ever.set()
    assert within(LIMIT, threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        within(LIMIT, lambda: 1 // 0)


def test_a_rank_that_owns_nothing_meets_nobody() -> None:
    assert BroadcastCarrier("gloo", 3, BUCKET_BYTES, 0.5).meet(None) == ""


def test_a_rank_is_met_at_the_address_that_engines_elsewhere_reach() -> None:
    assert address_towards(["127.0.0.1", "localhost"]) == "127.0.0.1"
    assert address_towards([]) == "127.0.0.1"
    meeting = call_meeting("gloo", 2, 4, ["http://127.0.0.1:8000"])
    assert (meeting.rank, meeting.address, meeting.world) == (2, "127.0.0.1", 5)
