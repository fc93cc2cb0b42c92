"""One rank of the lent weights' test: trains in bfloat16 with and without other weights passing through the model.

Usage: lent_weights_worker.py FOLDER; FOLDER holds the checkpoints base/ and other/. Writes FOLDER/found.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from layout_data import example_batch, negative_log_likelihood
from ranks import free_port
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.lent_weights import copy_to_host, put
from millrace.megatron.policy import Policy
from millrace.megatron.topology import init_distributed
from millrace.stages.sources import WeightSource

STEPS = 3


def main(folder: Path) -> None:
    found = {}
    for name, distributed in (("plain", False), ("distributed", True)):
        for lends in (False, True):
            found[f"{name}, {'lent' if lends else 'undisturbed'}"] = trained(folder, distributed, lends)
    torch.save(found, folder / "found.pt")


def trained(folder: Path, distributed: bool, lends: bool) -> dict[str, Tensor]:
    """The policy's weights after a few updates, between which it had other weights where `lends`."""
    os.environ["MASTER_PORT"] = str(free_port())
    trainer = TrainerConfig(
        device="cpu", threads_per_rank=1, collective_timeout_s=60, distributed_optimizer=distributed
    )
    topology = init_distributed(ParallelConfig(), trainer, seed=1)
    model, shape = ModelConfig(path=str(folder / "base"), dtype="bfloat16"), ModelShape.from_hf(folder / "base")
    policy = Policy(model, shape, ParallelConfig(), trainer, topology, optimizer=OptimizerConfig(lr=1e-3), seed=1)
    policy.load_hf(model.path)
    checkpointer = Checkpointer(folder / f"checkpoints-{distributed}-{lends}", keep=1)
    checkpoint = checkpointer.save(policy, 0, {}, name="first", keep_always=True)
    sources = (
        WeightSource("start", folder / "other", checkpoint=False),
        WeightSource("first", checkpoint, checkpoint=True),
    )
    for _ in range(STEPS):
        policy.train_step(example_batch(), negative_log_likelihood)
        if lends:
            own = copy_to_host(policy)
            for source in sources:
                source.load_into(policy, checkpointer)
            put(policy, own)
    weights = {name: tensor.detach().clone() for name, tensor in policy.hf_tensors()}
    topology.close()
    return weights


if __name__ == "__main__":
    main(Path(sys.argv[1]))
