import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "e2e"))  # real_runs

import torch
from cluster import Cluster, NoCluster, running_cluster
from real_runs import SFT, exported, run, write_world
from slurm_runs import SHORT_RL, run_dir_of, write_wide_recipe


@pytest.fixture(scope="session")
def one_cluster() -> Iterator[Cluster]:
    try:
        with running_cluster() as found:
            yield found
    except NoCluster as reason:
        pytest.skip(f"no Slurm cluster can be brought up here: {reason}")


@pytest.fixture(scope="session")
def local_cascade(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The export of SFT and RL with two ranks and two engines, run on this machine without Slurm."""
    world = write_world(tmp_path_factory.mktemp("a world without nodes"))
    recipe = write_wide_recipe(world, "here", stages=[SFT, SHORT_RL], domains=True)
    assert run(recipe) == 0
    return exported(run_dir_of(recipe))


@pytest.fixture
def cluster(one_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with every node free; what a test leaves behind is no matter of the next one."""
    yield one_cluster
    one_cluster.clear()
