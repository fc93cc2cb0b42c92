"""Which node runs what, and what does not fit."""

import dataclasses
from pathlib import Path

import pytest

from millrace.config.cluster import ClusterConfig, NodeConfig
from millrace.config.errors import ConfigError
from millrace.config.loading import load_cluster
from millrace.config.placement import Placement, VerifierPlace, place, read_placement, write_placement
from millrace.config.schema import (
    DomainConfig,
    FleetConfig,
    JudgeConfig,
    ModelConfig,
    MopdStage,
    ParallelConfig,
    PlacementConfig,
    Recipe,
    RlStage,
    SftStage,
    TrainerConfig,
)

CLUSTERS = sorted(Path(__file__).parents[3].glob("slurm/clusters/*.yaml"))


def cluster(slots: int, nodes: int) -> ClusterConfig:
    return ClusterConfig(name="site", nodes=nodes, node=NodeConfig(gpus=slots, cores=8, memory_gib=64))


def recipe(world: int = 4, **changes: object) -> Recipe:
    math = DomainConfig(environment="math", train="t", held_out="h")
    base = Recipe(
        name="run",
        run_dir="run",
        model=ModelConfig(path="m"),
        parallel=ParallelConfig(dp=world),
        fleet=FleetConfig(engines=2, transport="nccl"),
        domains={"math": math},
        stages=(RlStage(name="rl", domains=("math",), steps=1),),
    )
    return dataclasses.replace(base, **changes)


def taken(placement: Placement) -> dict[tuple[int, int], str]:
    """Who has each place of each node; fails when two have one."""
    places: dict[tuple[int, int], str] = {}
    for ranks in placement.trainer:
        for local in range(ranks.ranks):
            places[ranks.node, local] = f"rank {ranks.first_rank + local}"
    for server in placement.servers:
        for gpu in server.gpus:
            assert (server.node, gpu) not in places
            places[server.node, gpu] = f"{server.kind} {server.index}"
    return places


def test_tensor_parallel_ranks_that_overlap_share_a_node() -> None:
    overlapped = TrainerConfig(overlap_tensor_parallel=True)
    layout = ParallelConfig(tp=4, dp=3, sequence_parallel=True)
    whole = recipe(parallel=layout, trainer=overlapped, placement=PlacementConfig(trainer_nodes=3))
    assert {ranks.ranks for ranks in place(whole, cluster(slots=8, nodes=8)).trainer} == {4}
    cut = dataclasses.replace(whole, placement=PlacementConfig(trainer_nodes=2))
    assert place(dataclasses.replace(cut, trainer=TrainerConfig()), cluster(slots=8, nodes=8)).nodes
    with pytest.raises(ConfigError, match="6 ranks of a node are no multiple"):
        place(cut, cluster(slots=8, nodes=8))


def test_one_node_takes_ranks_and_engines_when_it_has_room() -> None:
    placement = place(recipe(), cluster(slots=8, nodes=4))
    assert placement.nodes == 1
    assert list(taken(placement).values()) == ["rank 0", "rank 1", "rank 2", "rank 3", "engine 0", "engine 1"]


def test_engines_stand_behind_a_trainer_of_several_nodes() -> None:
    placement = place(recipe(16, fleet=FleetConfig(engines=3, tensor_parallel=4, transport="nccl")), cluster(8, 4))
    assert [ranks.node for ranks in placement.trainer] == [0, 1]
    assert [(s.index, s.node, s.gpus) for s in placement.servers_of("engine")] == [
        (0, 2, (0, 1, 2, 3)),
        (1, 3, (0, 1, 2, 3)),
        (2, 2, (4, 5, 6, 7)),
    ]


def test_nodes_can_be_named() -> None:
    spread = recipe(2, placement=PlacementConfig(trainer_nodes=2, server_nodes=2))
    placement = place(spread, cluster(slots=4, nodes=4))
    assert placement.nodes == 4
    assert taken(placement) == {(0, 0): "rank 0", (1, 0): "rank 1", (2, 0): "engine 0", (3, 0): "engine 1"}
    beside = recipe(2, placement=PlacementConfig(trainer_nodes=2, server_nodes=0))
    assert place(beside, cluster(slots=4, nodes=4)).nodes == 2


def test_nodes_that_verify_stand_behind_all_others(tmp_path: Path) -> None:
    for world, nodes in ((4, 1), (16, 3)):  # engines beside the trainer, and behind it
        verifying = recipe(world, placement=PlacementConfig(verifier_nodes=2))
        placement = place(verifying, cluster(slots=8, nodes=5))
        assert placement.nodes == nodes + 2
        assert placement.verifiers == tuple(VerifierPlace(node=nodes + n, workers=8) for n in range(2))
        assert max(node for node, _ in taken(placement)) == nodes - 1
        write_placement(tmp_path / "placement.json", placement)
        assert read_placement(tmp_path / "placement.json") == placement


def test_judges_and_served_teachers_have_places_too() -> None:
    chat = DomainConfig(environment="genrm", train="t", held_out="h", judge="small")
    served = {"teacher_engine": FleetConfig(tensor_parallel=2), "placement": "served", "steps": 1}
    stages = (
        SftStage(name="sft", data=("d",), steps=1),
        MopdStage(name="one", teachers={"math": "stage(sft)", "chat": "stage(start)"}, **served),
        MopdStage(name="two", teachers={"math": "stage(sft)", "chat": "stage(sft)"}, **served),
    )
    judged = recipe(stages=stages, domains={**recipe().domains, "chat": chat}, judges={"small": JudgeConfig(model="j")})
    placement = place(judged, cluster(slots=16, nodes=1))
    kinds = [(server.kind, server.index) for server in placement.servers]
    # Stages follow each other, so the larger number of teachers is what needs room: two, not three.
    assert sorted(kinds) == [("engine", 0), ("engine", 1), ("judge-small", 0), ("teacher", 0), ("teacher", 1)]
    taken(placement)


def test_engines_with_cuda_ipc_live_on_the_trainers_gpus() -> None:
    shared = recipe(4, fleet=FleetConfig(engines=2, tensor_parallel=2, transport="ipc"))
    placement = place(shared, cluster(slots=4, nodes=1))
    assert placement.nodes == 1
    assert [server.gpus for server in placement.servers] == [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    ("changed", "slots", "nodes", "sentence"),
    [
        ({"fleet": FleetConfig(transport="ipc")}, 2, 9, "ipc, which reaches the GPUs of one node, but .* on 2 nodes"),
        ({}, 4, 1, "wants 2 nodes, 1 of them for the trainer's 4 ranks, but site has 1"),
        (
            {"placement": PlacementConfig(verifier_nodes=3)},
            8,
            3,
            "wants 4 nodes, 1 of them for the trainer's 4 ranks and 3 to verify programs, but site has 3; lower "
            "parallel.dp, fleet.engines or placement.verifier_nodes",
        ),
        ({"fleet": FleetConfig(tensor_parallel=8, transport="nccl")}, 4, 9, "engine wants 8 ranks on one node"),
        ({"placement": PlacementConfig(trainer_nodes=3)}, 4, 9, "trainer_nodes 3 does not divide the 4 ranks"),
        ({"placement": PlacementConfig(trainer_nodes=1)}, 2, 9, "gives each node 4 of the 4 ranks"),
        ({"placement": PlacementConfig(server_nodes=0)}, 4, 9, "no room for 2 vLLM servers beside them"),
        ({"placement": PlacementConfig(server_nodes=1)}, 1, 9, "server_nodes 1 has no room for 2 vLLM servers"),
        ({"fleet": FleetConfig(engines=2)}, 4, 9, "shared_memory, which does not reach the 2 engines on other nodes"),
    ],
)
def test_what_does_not_fit_is_said(changed: dict[str, object], slots: int, nodes: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        place(recipe(**changed), cluster(slots, nodes))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_cluster_files_of_the_repository_load(path: Path) -> None:
    assert load_cluster(path).name == path.stem


def test_a_cluster_file_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(
        "name: site\nnodes: 0\nnode: {gpus: 8, cores: 64, memory_gib: 1000}\nslurm: {time_limit: 4h, options: [ib]}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_cluster(file)
    assert [line.split(": ", 1)[1] for line in refused.value.problems] == [
        "nodes is 0; it must be at least 1",
        "slurm.time_limit is '4h'; write [DAYS-]HH:MM:SS, in quotes",
        "slurm.options.0 is 'ib'; write it as for sbatch, such as --constraint=ib",
    ]
    file.write_text("name: site\nnodes: 2\nnode: {gpu: h100, cores: 64, memory_gib: 1000}\nqueue: debug\n")
    with pytest.raises(ConfigError, match=r"node\.gpus is required") as refused:
        load_cluster(file)
    assert any("queue is not a known key" in line for line in refused.value.problems)
