"""Real buckets in real folders, from the sender's outbox to the reader that engines use."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millrace.converters.fingerprint import fingerprint
from millrace.rollout.transports.arrival import BucketReader
from millrace.rollout.transports.buckets import (
    ABORT,
    BUCKETS_AT_ONCE,
    Carrier,
    Feeder,
    Outbox,
    Sent,
    SyncError,
    clear,
    publish,
)
from millrace.rollout.transports.disk import DiskCarrier
from millrace.rollout.transports.shared_memory import SharedMemoryCarrier, shared_memory_folder


def tensors(seed: int, count: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    drawn = {}
    for n in range(count):
        values = torch.randn(3 + n, 5, generator=generator) * 100
        drawn[f"{seed}.{n}"] = values.to(dtypes[n % 3])
    return drawn


def carrier(kind: str, folder: Path, rank: int, bucket_bytes: int) -> Carrier:
    return (SharedMemoryCarrier if kind == "shared_memory" else DiskCarrier)(folder, rank, bucket_bytes)


def exchange(
    folder: Path, kind: str, ranks: list[dict[str, Tensor]], bucket_bytes: int
) -> tuple[dict, list[Sent], int]:
    """What arrives when every rank sends its tensors at the same time, what each says, and the number of buckets."""
    clear(folder)
    arrived: dict[str, Tensor] = {}
    buckets = 0
    reader = BucketReader(torch.device("cpu"))

    async def load(indexes: list[Path], names: list[str]) -> None:
        nonlocal buckets
        taken = {name: tensor.clone() for bucket in reader.read(indexes) for name, tensor in bucket.items()}
        assert list(taken) == names
        assert len(indexes) <= BUCKETS_AT_ONCE
        buckets += len(indexes)
        arrived.update(taken)

    sent: dict[int, Sent] = {}

    def send(rank: int) -> None:
        own = carrier(kind, folder, rank, bucket_bytes)
        outbox = Outbox(
            folder, rank, own, bucket_bytes=bucket_bytes, limit=20, sampled=lambda name: name.endswith(".1")
        )
        sent[rank] = outbox.send(ranks[rank].items())
        own.close()

    threads = [threading.Thread(target=send, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    asyncio.run(Feeder(folder, len(ranks), load, limit=20).run())
    for thread in threads:
        thread.join()
    return arrived, [sent[rank] for rank in range(len(ranks))], buckets


@pytest.mark.parametrize("kind", ["shared_memory", "disk"])
@pytest.mark.parametrize("bucket_bytes", [1, 150, 1 << 20])
def test_every_tensor_arrives_bit_for_bit(tmp_path: Path, kind: str, bucket_bytes: int) -> None:
    ranks = [tensors(1), tensors(2), {}]
    arrived, sent, buckets = exchange(tmp_path / "buckets", kind, ranks, bucket_bytes)
    expected = {**ranks[0], **ranks[1]}
    assert arrived.keys() == expected.keys()
    for name, tensor in expected.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)
    assert [rank.tensors for rank in sent] == [7, 7, 0]
    assert sent[0].fingerprints == {"1.1": fingerprint(ranks[0]["1.1"])}
    assert buckets == (14 if bucket_bytes == 1 else buckets)
    assert buckets >= 2


@pytest.mark.parametrize("kind", ["shared_memory", "disk"])
def test_only_the_end_markers_are_left_in_the_folder(tmp_path: Path, kind: str) -> None:
    exchange(tmp_path / "b", kind, [tensors(1), tensors(2)], 150)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["00000.end", "00001.end"]


def test_what_a_killed_run_left_behind_is_removed_at_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    publish(folder / "00000-000003.json", {"kind": "shared_memory"})
    clear(folder)
    assert list(folder.iterdir()) == []


def test_a_tensor_that_is_overwritten_after_its_turn_arrives_as_it_was(tmp_path: Path) -> None:
    def reused() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(4)
        for n in range(9):
            yield f"t{n}", buffer.fill_(n)

    class Reused(dict[str, Tensor]):
        def items(self):  # type: ignore[no-untyped-def,override]
            return reused()

    arrived, _, _ = exchange(tmp_path / "b", "shared_memory", [Reused()], 40)
    assert [arrived[f"t{n}"][0].item() for n in range(9)] == list(range(9))


def test_the_export_is_iterated_to_its_end_when_sending_fails(tmp_path: Path) -> None:
    class FullDisk(DiskCarrier):
        def describe(self, slot, entries):  # type: ignore[no-untyped-def]
            raise OSError(28, "No space left on device")

    seen = []

    def export() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors(1).items():
            seen.append(name)
            yield name, tensor

    clear(tmp_path / "b")
    outbox = Outbox(
        tmp_path / "b", 3, FullDisk(tmp_path / "b", 3, 100), bucket_bytes=100, limit=5, sampled=lambda name: False
    )
    sent = outbox.send(export())
    assert len(seen) == 7
    assert "rank 3" in sent.problem and "No space left" in sent.problem
    assert json.loads((tmp_path / "b" / "00003.end").read_text())["problem"] == sent.problem


def test_senders_stop_when_the_engines_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    clear(folder)

    async def lost(indexes: list[Path], names: list[str]) -> None:
        raise SyncError("every engine died")

    own = DiskCarrier(folder, 0, 100)
    outbox = Outbox(folder, 0, own, bucket_bytes=100, limit=20, sampled=lambda name: False)
    sent: list[Sent] = []
    thread = threading.Thread(target=lambda: sent.append(outbox.send(tensors(1).items())))
    thread.start()
    with pytest.raises(SyncError, match="every engine died"):
        asyncio.run(Feeder(folder, 1, lost, limit=20).run())
    thread.join()
    assert "take no more weights" in sent[0].problem
    assert (folder / ABORT).exists()


def test_a_rank_that_falls_silent_is_noticed(tmp_path: Path) -> None:
    async def load(indexes: list[Path], names: list[str]) -> None: ...

    clear(tmp_path / "b")
    with pytest.raises(SyncError, match="2 of 2 trainer ranks sent nothing"):
        asyncio.run(Feeder(tmp_path / "b", 2, load, limit=0.1).run())


def test_shared_memory_that_is_too_small_is_one_sentence(tmp_path: Path) -> None:
    own = SharedMemoryCarrier(tmp_path, 0, 1)
    with pytest.raises((SyncError, OSError)) as raised:
        own.buffer(0, 1 << 46)
    assert isinstance(raised.value, OSError) or "fleet.bucket_bytes" in str(raised.value)
    own.close()


def test_the_folder_in_shared_memory_belongs_to_the_run(tmp_path: Path) -> None:
    assert shared_memory_folder(tmp_path / "a") == shared_memory_folder(tmp_path / "a")
    assert shared_memory_folder(tmp_path / "a") != shared_memory_folder(tmp_path / "b")
