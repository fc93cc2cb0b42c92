"""What the slowest link allows, and when a sync is called slow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from millrace.config.cluster import NetworkConfig
from millrace.config.placement import NodeRanks, Placement, ServerPlace, write_placement
from millrace.config.schema import FleetConfig
from millrace.rollout.bandwidth import Link, slowest_link
from millrace.rollout.rendezvous import NETWORK, PLACEMENT, Rendezvous, write_json
from millrace.rollout.weight_sync import SyncReport

NETWORK_OF_SITE = NetworkConfig(intra_node_gb_s=300.0, inter_node_gb_s=25.0)


def job(folder: Path, engine_node: int) -> Rendezvous:
    engine = ServerPlace(kind="engine", index=0, node=engine_node, gpus=(4,))
    trainer = (NodeRanks(node=0, first_rank=0, ranks=4),)
    write_placement(folder / PLACEMENT, Placement(nodes=2, trainer=trainer, servers=(engine,)))
    write_json(folder / NETWORK, dataclasses.asdict(NETWORK_OF_SITE))
    return Rendezvous(folder / "7.0")


@pytest.mark.parametrize(
    ("transport", "node", "gb_s"), [("nccl", 0, 300.0), ("nccl", 1, 25.0), ("gloo", 1, 25.0), ("ipc", 0, 300.0)]
)
def test_on_a_cluster_the_links_are_those_of_its_file(tmp_path: Path, transport: str, node: int, gb_s: float) -> None:
    link = slowest_link(FleetConfig(transport=transport), tmp_path, job(tmp_path, node))  # type: ignore[arg-type]
    assert link.gb_s == gb_s
    assert link.seconds(50_000_000_000) == 50 / gb_s


@pytest.mark.parametrize("transport", ["shared_memory", "disk", "gloo"])
def test_elsewhere_a_link_is_measured(tmp_path: Path, transport: str) -> None:
    link = slowest_link(FleetConfig(transport=transport), tmp_path, None)  # type: ignore[arg-type]
    assert 0.01 < link.gb_s < 1000
    assert list(tmp_path.iterdir()) == []


def report(count: int, send: float, **phases: float) -> SyncReport:
    return SyncReport(
        version=3,
        engines=2,
        bytes=count,
        tensors=10,
        link=Link("the network between nodes", 2.0),
        seconds=99.0,
        phases={"probe": 5.0, "begin": 0.0, "meet": 4.0, "send": send, "finish": 0.0, "verify": 7.0, **phases},
        fingerprints=1,
        held=1,
        probe_mean=0.0,
        probe_max=0.0,
    )


def test_a_sync_is_printed_beside_what_its_slowest_link_allows() -> None:
    assert str(report(1_200_000_000, 0.8)) == (
        "sync: 1.2 GB in 0.8 s, 1.5 GB/s; the slowest link (the network between nodes, 2 GB/s) would allow 0.6 s"
    )
    assert report(1_200_000_000, 0.8).metrics() == {
        "sync/gigabytes": 1.2,
        "sync/seconds": 0.8,
        "sync/link_seconds": 0.6,
    }


def test_a_sync_of_more_than_three_times_that_is_called_slow_and_its_largest_part_named() -> None:
    assert not report(1_200_000_000, 1.7).slow
    assert str(report(1_200_000_000, 0.5, finish=1.5)).endswith("this is slow: 1.5 s of it went to finish")


def test_what_is_over_within_a_second_is_not_called_slow() -> None:
    assert not report(1000, 0.9).slow
    assert report(1000, 1.1).slow
