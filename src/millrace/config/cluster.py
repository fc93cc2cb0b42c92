"""What a cluster file says: the nodes a site has, and how jobs are given to it.

A cluster file is YAML in `slurm/clusters/`, read as strictly as a recipe (`loading.load_cluster`). It holds what a plan
and a scheduler ask of a site; what its shells need stands in `slurm/env.sh`. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

TIME_LIMIT = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    gpus: int
    """GPUs of a node; 0 for nodes of CPUs."""
    gpu: str | None = None
    """Name of the GPU, such as h100, h200 or b200: its arithmetic and memory bandwidth are known by it."""
    gpu_memory_gib: float = 80.0
    """Memory of one GPU in GiB, as the driver reports it."""
    cores: int
    """CPU cores of a node."""
    memory_gib: float
    """Host memory of a node in GiB."""
    slots: int | None = None
    """Trainer ranks, or ranks of engines, that one node takes; its GPUs when absent, without any its cores."""

    @property
    def places(self) -> int:
        """Ranks that one node takes."""
        return self.slots or self.gpus or self.cores


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    intra_node_gb_s: float = 450.0
    """Bandwidth between two GPUs of a node in GB/s, one direction."""
    inter_node_gb_s: float = 50.0
    """Bandwidth of one GPU to another node in GB/s, one direction."""
    latency_us: float = 10.0
    """Time of the smallest message between nodes in microseconds."""
    interface: str | None = None
    """Network interface for rendezvous and for what travels by gloo, such as eth0 or ib0; found by the name of the node
    when absent."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    account: str | None = None
    """Account to charge; Slurm's default when absent."""
    partition: str | None = None
    """Partition; Slurm's default when absent."""
    qos: str | None = None
    """Quality of service."""
    time_limit: str = "04:00:00"
    """Time limit of one job, [DAYS-]HH:MM:SS. A run that needs longer continues itself."""
    request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node=N, --gres=gpu:N, or not at all where whole nodes are given."""
    exclusive: bool = True
    """Ask for whole nodes."""
    warn_s: int = 300
    """Seconds before the time limit at which Slurm warns, so that the run saves itself."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, each as it is written there: --constraint=ib, --reservation=..."""


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    image: str
    """Image that pyxis starts the ranks in: a squashfs file or a registry's name."""
    mounts: tuple[str, ...] = ()
    """Folders of the host inside the container, HOST:CONTAINER or one path for both. Those of the recipe (run, model,
    data) are added by themselves."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    name: str
    """Name of the cluster."""
    nodes: int
    """Nodes that a job may use."""
    node: NodeConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    container: ContainerConfig | None = None
    """The container of the ranks; they run on the nodes as they are when absent."""
    python: str | None = None
    """Interpreter that has Millrace, on the nodes or in the container; when absent the one that launches, and in a
    container `python3`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank and engine. No secrets: the file and the job script are read by others."""


Problem = tuple[tuple[str, ...], str]
"""Path of a key, and what is wrong with it."""


def cluster_problems(cluster: ClusterConfig) -> list[Problem]:
    """Everything that types alone do not refuse."""
    return list(_problems(cluster))


def _problems(cluster: ClusterConfig) -> Iterator[Problem]:
    node, slurm = cluster.node, cluster.slurm
    counts = {("nodes",): cluster.nodes, ("node", "cores"): node.cores, ("slurm", "warn_s"): slurm.warn_s}
    if node.slots is not None:
        counts["node", "slots"] = node.slots
    for key, count in counts.items():
        if count < 1:
            yield key, f"is {count}; it must be at least 1"
    if node.gpus < 0:
        yield ("node", "gpus"), f"is {node.gpus}; it must be at least 0"
    sizes = {
        ("node", "memory_gib"): node.memory_gib,
        ("node", "gpu_memory_gib"): node.gpu_memory_gib,
        ("network", "intra_node_gb_s"): cluster.network.intra_node_gb_s,
        ("network", "inter_node_gb_s"): cluster.network.inter_node_gb_s,
    }
    for key, size in sizes.items():
        if size <= 0:
            yield key, f"is {size:g}; it must be above 0"
    if not TIME_LIMIT.fullmatch(slurm.time_limit):
        yield ("slurm", "time_limit"), f"is {slurm.time_limit!r}; write [DAYS-]HH:MM:SS, in quotes"
    for index, option in enumerate(slurm.options):
        if not option.startswith("-"):
            yield ("slurm", "options", str(index)), f"is {option!r}; write it as for sbatch, such as --constraint=ib"
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield ("environment", name), "is not a name that an environment variable can have"
