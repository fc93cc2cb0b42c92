"""The ranks of a trainer: process groups, device, threads, seeds.

Every rank is a process started with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment
(torchrun and the launcher do that). The groups are Megatron-Core's own, over NCCL on CUDA and gloo on CPU.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from millrace.config.schema import ParallelConfig, TrainerConfig
from millrace.errors import MillraceError
from millrace.megatron.cpu import adapt
from millrace.megatron.gaps import fill_gaps


class LayoutError(MillraceError):
    """The ranks that run do not fit the layout that was asked for."""


@dataclass(frozen=True)
class Topology:
    """Where this process stands among the ranks; group sizes and this rank's place in each group."""

    device: torch.device
    rank: int
    world: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    dp: int
    dp_rank: int
    cp: int
    cp_rank: int
    ep: int
    ep_rank: int
    etp: int
    etp_rank: int
    edp: int
    edp_rank: int

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The ranks that train on other sequences than this one."""
        return parallel_state.get_data_parallel_group()

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """The ranks that share this one's sequences."""
        return parallel_state.get_context_parallel_group()

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this rank's pipeline."""
        return parallel_state.get_pipeline_model_parallel_last_rank()

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    def close(self) -> None:
        """Leave all process groups. Every rank calls it once, at its end."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def init_distributed(parallel: ParallelConfig, trainer: TrainerConfig, seed: int) -> Topology:
    """Join the ranks named by the environment and build Megatron-Core's groups for the layout.

    Raises LayoutError when the number of ranks or the layout does not fit, before any group exists.
    """
    device = choose_device(trainer)
    rank, world = _ranks_from_environment()
    _check_layout(parallel, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything that is imported looks at the first GPU
        fill_gaps()
    else:
        adapt()
        torch.set_num_threads(trainer.threads_per_rank or max(1, (os.cpu_count() or 1) // world))
    torch.use_deterministic_algorithms(trainer.deterministic)
    timeout = timedelta(seconds=trainer.collective_timeout_s)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method="env://",
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        # Whole minutes only: never shorter than what was asked for.
        distributed_timeout_minutes=max(1, math.ceil(trainer.collective_timeout_s / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return _current_topology(device)


def choose_device(trainer: TrainerConfig) -> torch.device:
    """This rank's device; `auto` takes CUDA where there is one. Raises LayoutError when CUDA was named and is
    absent."""
    if trainer.device == "cpu" or (trainer.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LayoutError("trainer.device is cuda, but this machine has no CUDA device; use trainer.device=cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if local_rank >= torch.cuda.device_count():
        raise LayoutError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start at most one rank for each GPU"
        )
    return torch.device("cuda", local_rank)


def _ranks_from_environment() -> tuple[int, int]:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise LayoutError(f"{', '.join(missing)} not in the environment; start trainer ranks with millrace or torchrun")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _check_layout(parallel: ParallelConfig, world: int) -> None:
    p = parallel
    if p.world_size != world:
        raise LayoutError(
            f"parallel asks for tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {p.dp} = {p.world_size} ranks, but {world} "
            f"started; start {p.world_size} ranks or change parallel"
        )
    model_ranks = p.tp * p.cp * p.dp
    if model_ranks % (p.ep * p.etp):
        raise LayoutError(
            f"parallel.ep {p.ep} x parallel.etp {p.etp} does not divide the {model_ranks} ranks of one pipeline stage "
            "(tp x cp x dp)"
        )


def _current_topology(device: torch.device) -> Topology:
    ps = parallel_state
    return Topology(
        device=device,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp=ps.get_tensor_model_parallel_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        pp=ps.get_pipeline_model_parallel_world_size(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        dp=ps.get_data_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        cp=ps.get_context_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
        ep=ps.get_expert_model_parallel_world_size(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        etp=ps.get_expert_tensor_parallel_world_size(),
        etp_rank=ps.get_expert_tensor_parallel_rank(),
        edp=ps.get_expert_data_parallel_world_size(),
        edp_rank=ps.get_expert_data_parallel_rank(),
    )
