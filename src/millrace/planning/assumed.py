"""What a plan takes for granted: numbers that no recipe and no cluster file says. Every plan prints them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Assumed:
    value: float
    unit: str
    why: str

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}: {self.why}"


MEMORY: dict[str, Assumed] = {
    "gpu_context_gib": Assumed(2.0, "GiB a GPU", "CUDA context, NCCL buffers and cuBLAS workspaces of a trainer rank"),
    "fragmentation": Assumed(0.05, "of the activations", "allocated by torch beyond what is in use"),
    "engine_workspace_gib": Assumed(
        4.0, "GiB a GPU", "activations of a prefill and CUDA graphs of an engine, inside its share of the GPU"
    ),
    "rank_process_gib": Assumed(
        4.0, "GiB of the host", "process of a trainer rank on a GPU, page-locked buffers included"
    ),
    "cpu_rank_process_gib": Assumed(0.6, "GiB of the host", "process of a CPU rank with its libraries"),
    "engine_process_gib": Assumed(4.0, "GiB of the host", "processes of an engine, for each of its GPUs"),
    "verifier_process_gib": Assumed(0.05, "GiB of the host", "a worker that tests programs, with its zygote"),
    "cpu_engine_process_gib": Assumed(1.2, "GiB of the host", "processes of an engine on CPU"),
}


def gib(name: str) -> int:
    """An assumed number of GiB, in bytes."""
    return int(MEMORY[name].value * GIB)
