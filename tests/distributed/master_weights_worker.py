"""One of four ranks of the test of weights in FP8 alone: `master_weights_worker.py FOLDER`; each rank writes
FOLDER/found-RANK.pt, where each check of a case has the names of what differs.

FOLDER holds for each case the checkpoints CASE/base, CASE/other and CASE/exact, whose linears E4M3 holds exactly, and
mxfp8/odd with norms of few numbers.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layout_data import example_batch, negative_log_likelihood
from rounded_weights import BlockedTensor, RoundedTensor, round_linears, use_stand_ins
from running_policy import copied, cpu_trainer
from safetensors.torch import load_file
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from millrace.converters.safetensors_io import HFReader
from millrace.megatron import data_parallel, weights
from millrace.megatron import policy as policy_module
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.lent_weights import copy_to_host, put
from millrace.megatron.model import build_model
from millrace.megatron.policy import Policy
from millrace.megatron.precision import PLAIN, PrecisionError
from millrace.megatron.topology import Topology, init_distributed
from millrace.rollout.transports.buckets import Feeder, Outbox
from millrace.rollout.transports.disk import DiskCarrier
from millrace.stages.sources import WeightSource

TENSORWISE, MXFP8 = (PrecisionConfig(fp8=fp8, parameters=True) for fp8 in ("tensorwise", "mxfp8"))
TENSOR = ParallelConfig(tp=2, dp=2, sequence_parallel=True)
CASES: dict[str, tuple[PrecisionConfig, ParallelConfig, bool]] = {
    "tensor parallel": (TENSORWISE, TENSOR, False),
    "experts": (TENSORWISE, replace(TENSOR, ep=2), True),
    "mxfp8": (MXFP8, TENSOR, False),
    "stages and shared sequences": (TENSORWISE, ParallelConfig(pp=2, cp=2), True),
}
"""Precision, layout, and whether the optimizer's state waits in host memory."""
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)
BUCKET = 2000
"""Parameters of a bucket of the optimizer, so that weights lie on several ranks and in several buckets; and bytes of
one that a sync sends."""

Values = Mapping[str, Tensor]


class Case:
    def __init__(self, folder: Path, name: str, topology: Topology) -> None:
        self.folder, self.topology = folder / name, topology
        self.precision, self.parallel, self.offloads = CASES[name]
        self.found: dict[str, list[str]] = {}

    def policy(self, precision: PrecisionConfig, seed: int = 1, base: str = "base") -> Policy:
        trainer = trainer_of(self.offloads and precision.parameters)
        model = ModelConfig(path=str(self.folder / base), dtype="bfloat16")
        shape = ModelShape.from_hf(model.path)
        return Policy(
            model, shape, self.parallel, trainer, self.topology, optimizer=OPTIMIZER, seed=seed, precision=precision
        )

    def same(self, check: str, one: Values, other: Values) -> None:
        assert one.keys() == other.keys()
        self.found[check] = [name for name in one if not torch.equal(one[name], other[name])]

    def as_in(self, check: str, base: str, exported: Values) -> None:
        reader = HFReader(self.folder / base)
        self.same(check, exported, {name: reader.tensor(name) for name in exported})


def trainer_of(offloads: bool) -> Any:
    return cpu_trainer(max_tokens_per_micro_batch=64, distributed_optimizer=True, offload_optimizer=offloads)


def exported(policy: Policy, **how: Any) -> dict[str, Tensor]:
    return copied(policy.hf_tensors(**how))


def held_by(parameter: torch.nn.Parameter) -> Tensor:
    return parameter.dequantize() if isinstance(parameter, RoundedTensor) else parameter.data


def in_fp8(policy: Policy) -> dict[str, Tensor]:
    found = {name: p.dequantize() for name, p in policy.module.named_parameters() if isinstance(p, RoundedTensor)}
    assert found
    return found


def optimizer_state(policy: Policy) -> dict[str, Tensor]:
    """This rank's master weights and moments."""
    inner = [part.optimizer for part in policy.optimizer.chained_optimizers]
    with policy.optimizer_present():
        masters = [p for each in inner for group in each.param_groups for p in group["params"]]
        moments = [v for each in inner for of in each.state.values() for v in of.values() if isinstance(v, Tensor)]
        return {str(number): tensor.detach().clone() for number, tensor in enumerate((*masters, *moments))}


def update(policy: Policy, times: int) -> None:
    for _ in range(times):
        policy.train_step(example_batch(), negative_log_likelihood)


def loaded_and_exported(case: Case) -> Policy:
    policy = case.policy(case.precision)
    policy.load_hf(policy.config.path)
    case.as_in("loaded", "base", exported(policy))
    case.as_in("loaded, sent by few", "base", exported(policy, few_owners=True))
    parameters = weights.bind(policy.module, policy.shape, policy.topology, of=held_by)
    case.as_in("without masters", "base", copied(weights.hf_tensors(parameters)))
    case.found["exported"] = list(exported(policy))
    assert policy.owned_bytes() == sum(t.numel() * t.element_size() for t in exported(policy).values())
    return policy


def sent(case: Case, policy: Policy) -> None:
    """All ranks send, in many buckets, while they gather together: none waits for one that waits for it."""
    rank, indexes, files = case.topology.rank, case.folder / "indexes", case.folder / "files"
    for folder in (indexes, files):
        folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    received: dict[str, Tensor] = {}

    async def load(shown: list[Path], names: list[str]) -> None:
        for index in shown:
            received.update(load_file(files / json.loads(index.read_text())["file"]))

    carrier = DiskCarrier(files, rank, BUCKET)
    outbox = Outbox(indexes, rank, carrier, bucket_bytes=BUCKET, limit=30, sampled=lambda name: False)
    feeder = Feeder(indexes, torch.distributed.get_world_size(), load, limit=30)
    with ThreadPoolExecutor(1) as aside:
        feeding = aside.submit(lambda: asyncio.run(feeder.run())) if rank == 0 else None
        problem = outbox.send(policy.hf_tensors()).problem
        if feeding is not None:
            feeding.result()
    assert not problem, problem
    assert rank or received.keys() == set(HFReader(case.folder / "base").names)
    case.as_in("sent", "base", received)


def learned(case: Case) -> None:
    """Where nothing is rounded, an update is that of weights in bfloat16."""
    outcomes = []
    for precision in (case.precision, PLAIN):
        policy = case.policy(precision)
        policy.load_hf(str(case.folder / "exact"))
        update(policy, 1)
        outcomes.append(exported(policy))
    case.same("an update", *outcomes)


def saved_and_resumed(case: Case, policy: Policy) -> None:
    checkpointer = Checkpointer(case.folder / "rounded", keep=1)
    update(policy, 2)
    checkpointer.save(policy, policy.step, {})
    after_two, rounded = exported(policy), in_fp8(policy)
    update(policy, 1)

    resumed = case.policy(case.precision, seed=2)
    checkpointer.load(resumed)
    case.same("resumed, in FP8", in_fp8(resumed), rounded)
    case.same("resumed", exported(resumed), after_two)
    update(resumed, 1)
    case.same("resumed, after an update", exported(resumed), exported(policy))
    case.same("resumed, state of the optimizer", optimizer_state(resumed), optimizer_state(policy))

    plain = case.policy(PLAIN)
    checkpointer.load(plain)
    case.same("loaded without FP8", exported(plain), after_two)
    for part in plain.optimizer.chained_optimizers:
        part._copy_main_params_to_model_params()
    plain._trained.start_param_sync()
    case.same("master weights without FP8", exported(plain), after_two)


def taken_over(case: Case) -> None:
    """Of a run without FP8, and back."""
    plain = case.policy(PLAIN)
    plain.load_hf(plain.config.path)
    update(plain, 2)
    Checkpointer(case.folder / "plain", keep=1).save(plain, plain.step, {})
    policy = case.policy(case.precision, seed=2)
    Checkpointer(case.folder / "plain", keep=1).load(policy)
    case.same("taken over", exported(policy), exported(plain))
    Checkpointer(case.folder / "back", keep=1).save(policy, policy.step, {})
    state = optimizer_state(plain)
    update(plain, 1)
    Checkpointer(case.folder / "back", keep=1).load(plain)
    case.same("given back", optimizer_state(plain), state)


def swapped(case: Case, policy: Policy) -> None:
    """Teachers pass through the policy; a new stage begins from weights as they are saved."""
    checkpointer = Checkpointer(case.folder / "swapped", keep=1)
    before = exported(policy), in_fp8(policy), optimizer_state(policy)
    own = copy_to_host(policy)
    WeightSource("other", case.folder / "other", checkpoint=False).load_into(policy, checkpointer)
    case.as_in("a teacher", "other", exported(policy))
    teacher = checkpointer.save(policy, 0, {})
    WeightSource("start", case.folder / "base", checkpoint=False).load_into(policy, checkpointer)
    WeightSource("other", teacher, checkpoint=True).load_into(policy, checkpointer)
    case.as_in("a teacher's checkpoint", "other", exported(policy))
    put(policy, own)
    case.same("put back", exported(policy), before[0])
    case.same("put back, in FP8", in_fp8(policy), before[1])
    case.same("put back, state of the optimizer", optimizer_state(policy), before[2])

    policy.reset_optimizer(OPTIMIZER, total_steps=0)
    case.same("reset", exported(policy), before[0])
    masters = dict(list(before[2].items())[: len(policy.masters.parts())])
    case.same(
        "reset, master weights", optimizer_state(policy), {name: m.bfloat16().float() for name, m in masters.items()}
    )
    update(policy, 1)
    case.found["reset, after an update"] = [name for name, t in exported(policy).items() if not t.isfinite().all()]

    twin = policy.frozen_twin()
    assert not any(isinstance(p, RoundedTensor) for p in twin.module.parameters())
    twin.load_hf(str(case.folder / "other"))
    case.as_in("a twin", "other", exported(twin))


def loaded_or_refused(case: Case) -> None:
    """Norms of 16 numbers, which not every Megatron-Core finds again in the buffer that MXFP8 is gathered in."""
    try:
        policy = case.policy(case.precision, base="odd")
    except PrecisionError as error:
        assert "no multiple of 64 numbers" in str(error)
        return
    policy.load_hf(policy.config.path)
    case.as_in("odd", "odd", exported(policy))


def found_in(folder: Path, name: str) -> dict[str, list[str]]:
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    topology = init_distributed(CASES[name][1], trainer_of(False), seed=1)
    try:
        case = Case(folder, name, topology)
        policy = loaded_and_exported(case)
        sent(case, policy)
        learned(case)
        saved_and_resumed(case, policy)
        taken_over(case)
        swapped(case, policy)
        if case.precision is MXFP8:
            loaded_or_refused(case)
    finally:
        topology.close()
    return case.found


def with_stand_ins() -> None:
    """Models whose linears are in FP8 where the precision asks for it, many buckets, and equal micro-batches."""
    use_stand_ins()

    def build(*options: Any, precision: PrecisionConfig, **more: Any) -> Any:
        model = build_model(*options, precision=PLAIN, **more)
        return round_linears(model, KINDS[precision.fp8]) if precision.parameters else model

    settings = data_parallel.data_parallel_settings
    data_parallel.data_parallel_settings = lambda *options: replace(settings(*options), bucket_size=BUCKET)
    policy_module.token_multiple = lambda *unused: 1
    policy_module.build_model = build


KINDS: dict[str, type[RoundedTensor]] = {"tensorwise": RoundedTensor, "mxfp8": BlockedTensor}


def main(folder: Path) -> None:
    with_stand_ins()
    torch.save({name: found_in(folder, name) for name in CASES}, folder / f"found-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
