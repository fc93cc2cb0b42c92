"""One case of `benchmarks.gpu`, in a process of its own: `python -m benchmarks.gpu_case CASE.json ROWS.jsonl`.

Each row is written as soon as it is known, so that a case which ends badly leaves what it had. What this machine cannot
do is a row that says so.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_cases import Case, Row
from benchmarks.gpu_models import Choice, choose
from benchmarks.setting import OPTIMIZER, lognormal_lengths, race, ratio
from benchmarks.train_step import BareBatch, BareLoop
from millrace.algorithms.aggregation import token_weights
from millrace.algorithms.losses import sft_loss_fn
from millrace.config.schema import ModelConfig, ParallelConfig, TrainerConfig
from millrace.data.batch import TokenBatch
from millrace.errors import MillraceError
from millrace.megatron.kernels import uses_transformer_engine
from millrace.megatron.policy import Policy
from millrace.megatron.precision import require_computable
from millrace.megatron.topology import Topology, init_distributed
from millrace.planning.assumed import GIB
from millrace.planning.flops import train_flops


def rows_of(case: Case) -> Iterator[Row]:
    if case.kind == "rate":
        yield matrix_rates(case)
    elif case.kind == "train":
        yield from training_rows(case)
    else:
        yield overhead(case)


def matrix_rates(case: Case) -> Row:
    """Operations a second of one large product: what utilisation is measured against."""
    size = 256 if case.tiny else 8192
    a, b = (torch.randn(size, size, device=case.device, dtype=torch.bfloat16) for _ in range(2))
    row: Row = {"rate bf16": 2 * size**3 / _seconds(case, lambda: a @ b)}
    if case.device == "cpu" or torch.cuda.get_device_capability() < (8, 9):
        return row | {"rate fp8": None}
    one = torch.ones((), device=case.device)
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()

    def product() -> torch.Tensor:
        return torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return row | {"rate fp8": 2 * size**3 / _seconds(case, product)}


def _seconds(case: Case, work: Callable[[], object]) -> float:
    """Of one call, the median of several stretches of calls after a warm-up."""
    calls, stretches = (2, 3) if case.tiny else (20, 7)
    measured = []
    for _ in range(stretches + 1):
        _wait(case.device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(case.device)
        measured.append((time.perf_counter() - start) / calls)
    return median(measured[1:])


def training_rows(case: Case) -> Iterator[Row]:
    """SFT steps and log-prob passes, for each length of the sequences."""
    with chosen_policy(case) as (choice, policy):
        for length in case.lengths:
            batch = packed_batch(length, case.micro_batches * case.capacity, policy.shape.vocab_size)
            yield described(case, choice, policy) | measured(case, policy, batch, length, choice.planned)
        if case.profile:
            yield {"costs": largest_costs(case, policy, batch)}


@contextmanager
def chosen_policy(case: Case, share: int = 1) -> Iterator[tuple[Choice, Policy]]:
    """The largest model of the case's family that fits into the free memory, or into a part of it."""
    room = free_bytes(case.device) // share
    topology = one_rank(case)
    choice = choose_here(case, room, topology.device)
    policy = Policy(
        ModelConfig(path="(random)", dtype="bfloat16"),
        choice.shape,
        ParallelConfig(),
        TrainerConfig(device=case.device, max_tokens_per_micro_batch=case.capacity, recompute=choice.recompute),
        topology,
        optimizer=OPTIMIZER,
        seed=1,
        precision=case.precision,
    )
    yield choice, policy
    topology.close()


def one_rank(case: Case) -> Topology:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    return init_distributed(ParallelConfig(), TrainerConfig(device=case.device), seed=1)


def choose_here(case: Case, room: int, device: torch.device) -> Choice:
    """Raises MillraceError where nothing fits, or where the precision cannot be computed here."""
    fits = None
    for fused in (True, False):  # whether a model's layers can be fused is known once it is chosen
        fits = choose(case.family, case.capacity, room, case.precision, device=case.device, fused=fused, tiny=case.tiny)
        if fits is not None and uses_transformer_engine(fits.shape, device, torch.bfloat16) == fused:
            require_computable(case.precision, fits.shape, device)
            return fits
    raise MillraceError(f"no model of this kind fits into the {room / GIB:.0f} GiB that are free")


def packed_batch(length: int, tokens: int, vocab: int) -> TokenBatch:
    """Sequences of random tokens of up to `length`, log-normal around a third of it, that fill about `tokens`."""
    drawn = lognormal_lengths(4096, length / 3, 0.6, length)
    lengths = [length]
    while sum(lengths) + drawn[len(lengths)] <= tokens:
        lengths.append(drawn[len(lengths)])
    generator = torch.Generator().manual_seed(2)
    batch = TokenBatch(torch.randint(0, vocab, (sum(lengths),), generator=generator), torch.tensor(lengths))
    mask = torch.ones(sum(lengths)).index_fill(0, batch.offsets[:-1], 0.0)
    return batch.with_streams(weight=token_weights(mask, batch.lengths))


def described(case: Case, choice: Choice, policy: Policy) -> Row:
    fused = policy.module.config.transformer_impl == "transformer_engine"
    return {
        "model": choice.name,
        "parameters": choice.shape.parameter_count(),
        "precision": f"{case.fp8}{', emulated' if case.precision.emulate else ''}" if case.fp8 != "none" else "bf16",
        "layers": "Transformer Engine" if fused else "plain torch",
        "recompute": choice.recompute,
    }


def measured(case: Case, policy: Policy, batch: TokenBatch, length: int, planned: int) -> Row:
    loss_fn, losses = sft_loss_fn(), []
    begin_peak(case.device)

    def step() -> None:
        losses.append(policy.train_step(batch, loss_fn)["loss"])

    step_seconds = timed(case, step, warm_up=2, rounds=3)
    peak = peak_bytes(case.device)
    pass_seconds = timed(case, lambda: policy.logprobs(batch), warm_up=1, rounds=3)
    tokens = batch.tokens.numel()
    flops = sum(n * train_flops(policy.shape, n, "none") for n in batch.lengths.tolist())
    return {
        "packed": length,
        "micro_batch": case.capacity,
        "tokens": tokens,
        "sequences": len(batch),
        "step_s": step_seconds,
        "tokens_s": tokens / step_seconds,
        "flops_s": flops / step_seconds,
        "logprob_tokens_s": tokens / pass_seconds,
        "peak_bytes": peak,
        "planned_bytes": planned,
        "losses": losses,
    }


def timed(case: Case, work: Callable[[], object], *, warm_up: int, rounds: int) -> float:
    seconds = []
    for _ in range(warm_up + rounds):
        _wait(case.device)
        start = time.perf_counter()
        work()
        _wait(case.device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[warm_up:])


def overhead(case: Case) -> Row:
    """Policy.train_step over the shortest Megatron-Core loop that does the same work (`benchmarks.train_step`)."""
    with chosen_policy(case, share=2) as (choice, policy):
        batch = packed_batch(case.capacity, case.micro_batches * case.capacity, policy.shape.vocab_size)
        bare = BareLoop(policy, [BareBatch.of(micro_batch) for micro_batch in policy.cut(batch)])
        losses: list[float] = []

        def step() -> None:
            losses.append(policy.train_step(batch, sft_loss_fn())["loss"])

        seconds = race({"policy": step, "bare": bare.step}, rounds=3 if case.tiny else 5)
        middle, low, high = ratio(seconds, "policy", "bare")
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses, bare.losses, strict=True))
        return {
            **described(case, choice, policy),
            "packed": case.capacity,
            "overhead": middle,
            "overhead_quartiles": [low, high],
            "policy_s": median(seconds["policy"]),
            "bare_s": median(seconds["bare"]),
            "losses_apart": apart,
        }


def largest_costs(case: Case, policy: Policy, batch: TokenBatch) -> list[tuple[str, float]]:
    """The three operations that take most of a step, with their share of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if case.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        policy.train_step(batch, sft_loss_fn())
        _wait(case.device)
    of_device = "self_device_time_total" if case.device == "cuda" else "self_cpu_time_total"
    times = {event.key: float(getattr(event, of_device)) for event in profiler.key_averages()}
    whole = sum(times.values()) or math.nan
    return [(name, times[name] / whole) for name in sorted(times, key=lambda name: -times[name])[:3]]


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def begin_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """The most that this process held: of the GPU with the driver's own part, on the CPU of the host's memory."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_reserved() + outside


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(case: Case, out: Path) -> None:
    with out.open("a", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps({"case": case.name, **row}) + "\n")
            file.flush()

        try:
            for row in rows_of(case):
                write(row)
        except MillraceError as problem:
            write({"problem": str(problem)})
        except torch.OutOfMemoryError as problem:
            write({"problem": f"out of memory: {str(problem).splitlines()[0]}"})


def read_case(facts: dict[str, Any]) -> Case:
    return Case(**{**facts, "lengths": tuple(facts["lengths"])})


if __name__ == "__main__":
    main(read_case(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
