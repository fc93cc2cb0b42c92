import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "e2e"))  # real_runs

from cluster import Cluster, NoCluster, running_cluster


@pytest.fixture(scope="session")
def one_cluster() -> Iterator[Cluster]:
    try:
        with running_cluster() as found:
            yield found
    except NoCluster as reason:
        pytest.skip(f"no Slurm cluster can be brought up here: {reason}")


@pytest.fixture
def cluster(one_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with every node free; what a test leaves behind is no matter of the next one."""
    yield one_cluster
    one_cluster.clear()
