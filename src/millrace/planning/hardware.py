"""What a GPU can do at most, and which share of it is taken for granted.

Peaks are of dense bfloat16 products and of the memory, as the vendor's data sheets give them.
"""

from __future__ import annotations

from dataclasses import dataclass

from millrace.config.cluster import ClusterConfig
from millrace.config.errors import ConfigError
from millrace.planning.assumed import Assumed


@dataclass(frozen=True)
class Gpu:
    flops: float
    """Operations a second, bfloat16, dense."""
    memory_bytes_s: float
    source: str


GPUS: dict[str, Gpu] = {
    "a100": Gpu(312e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Gpu(989.4e12, 3.35e12, "NVIDIA H100 SXM data sheet"),
    "h200": Gpu(989.4e12, 4.8e12, "NVIDIA H200 SXM data sheet"),
    "b200": Gpu(2250e12, 8.0e12, "NVIDIA HGX B200 data sheet"),
}

SPEED: dict[str, Assumed] = {
    "dense_efficiency": Assumed(0.45, "of the peak", "matrices that every token goes through, and the output layer"),
    "expert_efficiency": Assumed(0.30, "of the peak", "grouped products of experts, whose rows are few and uneven"),
    "attention_efficiency": Assumed(0.35, "of the peak", "the part of attention that grows with the sequence"),
    "scan_efficiency": Assumed(0.10, "of the peak", "the state-space scan, which the memory bounds"),
    "memory_efficiency": Assumed(0.60, "of the bandwidth", "weights and cache that an engine reads for each token"),
    "network_efficiency": Assumed(0.70, "of the bandwidth", "collectives; none is taken to hide behind computation"),
    "collective_us": Assumed(15.0, "us", "start of a collective inside a node"),
    "decode_overhead_ms": Assumed(2.0, "ms a step", "an engine's scheduling and sampling between two steps"),
    "mean_answer": Assumed(0.35, "of max_response_tokens", "mean length of an answer, where no run was measured"),
    "answer_spread": Assumed(0.8, "sigma", "of the logarithm of the length of answers"),
    "sft_tokens": Assumed(
        16384.0, "tokens", "mean length of a training sequence of SFT, a quarter of max_length at most"
    ),
    "prompt_tokens": Assumed(1024.0, "tokens", "mean length of a prompt, a quarter of the engine's length at most"),
}


def gpu_of(cluster: ClusterConfig) -> Gpu:
    """Raises ConfigError for a GPU whose peaks are not known, and for nodes of CPUs, which have no such number."""
    name = cluster.node.gpu
    if not cluster.node.gpus:
        raise ConfigError(f"the nodes of {cluster.name} have no GPUs: times are told from a measured run alone")
    if name not in GPUS:
        raise ConfigError(
            f"node.gpu of {cluster.name} is {name!r}, whose speed is not known; name one of {', '.join(GPUS)}"
        )
    return GPUS[name]
