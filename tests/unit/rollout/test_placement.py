"""Which GPUs the servers of a run get."""

import pytest

from millrace.config.schema import DomainConfig, FleetConfig, JudgeConfig, ModelConfig, ParallelConfig, Recipe
from millrace.rollout.member import FleetError
from millrace.rollout.placement import fleet_gpus, fleet_seats, judge_gpus, teacher_gpus, visible_gpus, with_peers

JUDGES = {
    "far": JudgeConfig(url="http://node7/v1"),
    "big": JudgeConfig(model="b", engine=FleetConfig(tensor_parallel=2)),
    "small": JudgeConfig(model="s"),
}
TEACHER = FleetConfig(tensor_parallel=2)


def recipe(engines=2, **fleet) -> Recipe:
    """Two trainer ranks, two engines, three judges of which two are served."""
    domains = {name: DomainConfig(environment="genrm", judge=name, train="t", held_out="h") for name in JUDGES}
    return Recipe(
        name="r",
        run_dir="r",
        model=ModelConfig(path="m"),
        parallel=ParallelConfig(dp=2),
        fleet=FleetConfig(engines=engines, **fleet),
        judges=JUDGES,
        domains=domains,
        stages=(),
    )


@pytest.fixture(autouse=True)
def all_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def places(recipe: Recipe) -> list[list[str]]:
    judges = [judge_gpus(recipe, name) for name in ("big", "small")]
    return [fleet_gpus(recipe), *judges, *(teacher_gpus(recipe, TEACHER, number) for number in range(2))]


def test_fleet_judges_and_teachers_come_one_behind_the_other_behind_the_trainer():
    assert places(recipe()) == [["2", "3"], ["4", "5"], ["6"], ["7", "8"], ["9", "10"]]


def test_a_colocated_fleet_leaves_its_places_to_the_others():
    assert places(recipe(transport="ipc")) == [["0", "1"], ["2", "3"], ["4"], ["5", "6"], ["7", "8"]]


def test_a_server_that_opens_the_trainers_memory_sees_its_gpus_behind_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert fleet_seats(recipe(transport="ipc")).peers == ["4", "5"]
    assert fleet_seats(recipe(transport="nccl", engines=1)).peers == []
    assert with_peers(["6", "7"], ["4", "5", "6", "7"]) == ["6", "7", "4", "5"]


def test_places_count_among_the_devices_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,6,7,9,11,12,13,14")
    assert places(recipe()) == [["2", "3"], ["6", "7"], ["9"], ["11", "12"], ["13", "14"]]


def test_without_a_trainer_the_engines_get_the_first_ones():
    assert fleet_gpus(recipe(), beside_trainer=False) == ["0", "1"]


def test_devices_that_are_visible_by_name_are_passed_on_by_name(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe, MIG-7f01,GPU-9a")
    assert visible_gpus([1, 2], "cuda") == ["MIG-7f01", "GPU-9a"]


def test_no_server_takes_a_gpu_that_the_run_may_not_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(FleetError, match=r"want 3 GPUs, but CUDA_VISIBLE_DEVICES names 2 \(4,5\)"):
        visible_gpus([2], "cuda")


def test_on_cpu_the_visible_devices_refuse_nothing(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert visible_gpus([2], "cpu") == ["2"]


@pytest.mark.parametrize("visible", ["", None])
def test_without_visible_devices_all_are(monkeypatch, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus([7], "cuda") == ["7"]


def test_servers_that_already_run_want_no_place(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert visible_gpus([], "cuda") == []
