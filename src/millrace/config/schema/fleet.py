"""Engines, judges, and the nodes of a cluster that they stand on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    engines: int = 1
    """vLLM servers started on this machine. 0 with `addresses`: a fleet that already runs."""
    addresses: tuple[str, ...] = ()
    """Base URLs of servers that already run, as `millrace serve` says them."""
    interface: str = "127.0.0.1"
    """Address the servers listen on."""
    tensor_parallel: int = 1
    """Ranks of one engine."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the engine; with the trainer's own the log-probs agree best."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: the engine's linear layers multiply in FP8 by blocks of 128 x 128, quantised anew from the trainer's weights
    at each sync. Log-probs then differ more from the trainer's: correct for it by an RL stage's `off_policy`, and raise
    `probe_tolerance`. Needs dtype bfloat16, and GPUs of compute capability 8.9 or CPUs with AMX."""
    max_model_len: int = 4096
    """Longest prompt plus answer in tokens."""
    max_num_seqs: int = 64
    """Most sequences an engine decodes at one time."""
    kv_cache_bytes: int = 268435456
    """KV cache of one engine on CPU."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory an engine may take."""
    threads_per_engine: int = 1
    """CPU threads of one engine on CPU."""
    transport: Literal["shared_memory", "disk", "gloo", "nccl", "ipc"] = "shared_memory"
    """How weights reach the engines: shared memory on one host, safetensors on a shared disk, broadcasts by gloo to
    engines on CPU wherever they are, by NCCL to engines on GPUs, or CUDA IPC on the trainer's own GPUs."""
    sleep: Literal["never", "offload", "discard"] = "never"
    """With transport ipc: while the trainer trains, engines give their GPU memory back, and take it again at the sync,
    the KV cache last. offload keeps their weights in host memory, discard does not, since each sync brings all."""
    bucket_bytes: int = 67108864
    """Weights travel in buckets of about this size."""
    start_timeout_s: float = 300.0
    """How long an engine may take to start."""
    request_timeout_s: float = 600.0
    """How long one request may take before its prompt is given to another engine."""
    heartbeat_s: float = 2.0
    """Seconds between health probes; three unanswered in a row and the engine counts as dead."""
    max_restarts: int = 3
    """Restarts of one engine before the run gives up."""
    probe_tolerance: float = 0.05
    """Largest allowed mean |log-prob difference| of the probe prompt between trainer and engine after a sync; float32
    stays below 1e-4, so a recipe in float32 does well to ask for it."""
    extra_args: tuple[str, ...] = ()
    """Further command-line arguments of the vLLM server."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    trainer_nodes: int | None = None
    """Nodes over which the trainer's ranks are spread evenly; as few as hold them when absent."""
    server_nodes: int | None = None
    """Nodes for the vLLM servers of fleet, judges and served teachers, behind the trainer's. 0: beside the trainer's
    ranks on its own nodes. As few as hold them when absent."""
    verifier_nodes: int = 0
    """Nodes that do nothing but test the programs of `code` domains in their sandboxes, as many at one time as a node
    has cores; behind all others. 0: they are tested on rank 0's machine, as in a run on one machine in any case."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    model: str | None = None
    """Folder of a Hugging Face checkpoint that Millrace serves with vLLM as the judge; or `url`."""
    url: str | None = None
    """OpenAI-compatible endpoint of a judge that already runs, such as http://node7:8000/v1; or `model`. It is asked
    directly: proxies that the environment names are not used."""
    served_name: str = "judge"
    """Name of the model at that endpoint."""
    api_key_variable: str | None = None
    """Environment variable that holds the endpoint's API key; none is sent when absent."""
    form: Literal["roles", "prompt"] = "roles"
    """genrm: how two answers are shown: as messages of the roles response_1 and response_2 behind the conversation,
    which NVIDIA's GenRM is trained on, or written out in one user message, which any instruction-following model
    reads."""
    temperature: float = 0.6
    """Sampling temperature of a verdict."""
    top_p: float = 0.95
    """Nucleus sampling threshold of a verdict."""
    max_tokens: int = 16384
    """Longest verdict in tokens, its reasoning included."""
    timeout_s: float = 600.0
    """How long one verdict may take."""
    retries: int = 2
    """Further tries of a verdict that failed or could not be parsed; after the last one genrm
    takes default scores, and the others mask the answer."""
    concurrency: int = 64
    """Most verdicts that are asked for at one time."""
    engine: FleetConfig = field(default_factory=FleetConfig)
    """How the judge's own vLLM server is started, with `model`."""
