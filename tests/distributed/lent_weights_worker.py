"""One rank of the lent weights' test: trains in bfloat16 with and without other weights passing through the model.

Usage: lent_weights_worker.py FOLDER; FOLDER holds the checkpoints base/ and other/. Writes FOLDER/found.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from layout_data import example_batch, negative_log_likelihood
from running_policy import copied, cpu_trainer, running_policy
from torch import Tensor

from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.lent_weights import copy_to_host, put
from millrace.ports import free_port
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
    model = ModelConfig(path=str(folder / "base"), dtype="bfloat16")
    trainer, optimizer = cpu_trainer(distributed_optimizer=distributed), OptimizerConfig(lr=1e-3)
    with running_policy(model, ParallelConfig(), trainer, optimizer=optimizer, port=free_port()) as policy:
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
        return copied(policy.hf_tensors())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
