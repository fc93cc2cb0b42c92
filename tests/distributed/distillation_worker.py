"""One rank of the distillation tests: loss and gradient of each signal for each case, written to a file.

Usage: distillation_worker.py CASES.json FOLDER; every rank writes FOLDER/CASE-RANK.pt for each case.
"""

from __future__ import annotations

import json
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from distillation_reference import HIGH, LOW, TEACHERS, TEMPERATURE, TOP_K
from running_policy import copied, cpu_trainer, running_policy
from torch import Tensor

from millrace.algorithms.distillation import mopd_loss_fn
from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from millrace.data.batch import TokenBatch
from millrace.megatron import weights
from millrace.megatron.divergence import Divergence, TeacherStates
from millrace.megatron.policy import Policy

DIVERGENCES: dict[str, dict[str, Any]] = {
    "full": {},
    "top_k student": {"top_k": TOP_K, "support": "student"},
    "top_k teacher": {"top_k": TOP_K, "support": "teacher"},
    "top_k all": {"top_k": 320, "support": "student"},
    "top_k more than one rank's": {"top_k": 200, "support": "teacher"},
}


def main(cases: list[dict[str, Any]], folder: Path) -> None:
    for case in cases:
        with running_policy(
            ModelConfig(path=case["checkpoints"]["student"], dtype="float32"),
            ParallelConfig(**case["parallel"]),
            cpu_trainer(max_tokens_per_micro_batch=case["capacity"], logprob_chunk_tokens=7),
            optimizer=OptimizerConfig(lr=1e-3),
            port=case["port"],
        ) as policy:
            found = results(policy, torch.load(case["batch"], weights_only=False), case["checkpoints"])
            torch.save(found, folder / f"{case['name']}-{policy.topology.rank}.pt")


def results(policy: Policy, batch: TokenBatch, checkpoints: dict[str, str]) -> dict[str, Any]:
    alone = batch.select([1])  # of the second teacher; other data-parallel ranks have nothing
    states, states_alone, logps, shared = [], [], [], []
    for number, name in enumerate(TEACHERS, start=1):
        resident = policy.frozen_twin()
        resident.load_hf(checkpoints[name])
        logps.append(resident.logprobs(batch, temperature=TEMPERATURE)[0])
        states.append(resident.teacher_states(batch, number))
        states_alone.append(resident.teacher_states(alone, number))
        shared.append(shares_head(resident, states[-1]))
    swapped = []
    for number, name in enumerate(TEACHERS, start=1):
        policy.load_hf(checkpoints[name])
        swapped.append(policy.teacher_states(batch, number))
        shared.append(not shares_head(policy, swapped[-1]))
    policy.load_hf(checkpoints["student"])
    taught = batch.streams["taught"]
    sampled = batch.with_streams(teacher_logp=torch.where(taught == 1, logps[0], logps[1]))
    found = {
        "sampled": loss_and_gradient(policy, sampled, "sampled", None),
        "full, one sequence": loss_and_gradient(policy, alone, "full", Divergence(states_alone)),
    }
    for name, options in DIVERGENCES.items():
        found[name] = loss_and_gradient(policy, batch, "full", Divergence(states, **options))
    return {
        "signals": found,
        "apart": max(map(apart, states, swapped)),
        "states": [s.hidden for s in states],
        "only swapped heads are copied": all(shared),
    }


def shares_head(policy: Policy, states: TeacherStates) -> bool:
    """Whether the states' head is the model's own memory."""
    return states.head_weight is not None and states.head_weight.data_ptr() == policy.module.head_weight.data_ptr()


def apart(one: TeacherStates, other: TeacherStates) -> float:
    """Largest difference of two teachers' hidden states and heads."""
    tensors = [[*states.hidden, states.head_weight] for states in (one, other) if states.head_weight is not None]
    return max((float((a - b).abs().max()) for a, b in zip(*tensors, strict=True) if a.numel()), default=0.0)


def loss_and_gradient(policy: Policy, batch: TokenBatch, signal: str, divergence: Divergence | None) -> dict[str, Any]:
    loss_fn = mopd_loss_fn(signal, ratio_low=LOW, ratio_high=HIGH, teachers=TEACHERS)
    metrics = policy.backward(policy.cut(batch), loss_fn, temperature=TEMPERATURE, entropy=True, divergence=divergence)
    return {"metrics": metrics, "gradients": gradients(policy)}


def gradients(policy: Policy) -> dict[str, Tensor]:
    """This rank's gradients as Hugging Face tensors."""
    bound = weights.bind(policy.module, policy.shape, policy.topology, of=attrgetter("main_grad"))
    return copied(weights.hf_tensors(bound))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
