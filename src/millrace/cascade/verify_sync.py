"""One rank of `millrace verify sync`: proves that swapped weights are the trainer's.

A real engine starts on the checkpoint. The trainer changes every tensor, pushes, and exports what it holds. Then one
set of greedy answers must agree everywhere:

    the swapped engine  =  a fresh engine on the exported checkpoint          (tokens)
    the swapped engine  =  the trainer, transformers on the export            (log-probs, and the greedy choice)

Every rank is started as `python -m millrace.cascade.verify_sync --hf FOLDER --tp 2`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import FleetConfig, TrainerConfig
from millrace.data.batch import TokenBatch
from millrace.megatron import weights
from millrace.megatron.export import export_hf
from millrace.megatron.policy import Policy
from millrace.megatron.verify_worker import load_policy, seeded_tokens, transformers_logits
from millrace.megatron.worker import (
    PASSED,
    Verdict,
    add_layout_arguments,
    conclude,
    end_with,
    is_main,
    on_rank_zero,
    ranks,
)
from millrace.rollout.fleet import Fleet
from millrace.rollout.placement import HERE, Seats, visible_gpus
from millrace.rollout.types import Request, Rollout, SamplingParams
from millrace.rollout.weight_sync import SyncReport, WeightSync

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 4, 16, 24
TOLERANCE = 1e-4
"""Largest |difference| of float32 log-probs."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="millrace verify sync", description=__doc__)
    parser.add_argument("--hf", required=True, help="folder of the Hugging Face checkpoint")
    parser.add_argument("--card", help="YAML file that records the check")
    parser.add_argument(
        "--transport", choices=("shared_memory", "disk", "gloo", "nccl", "ipc"), default="shared_memory"
    )
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    add_layout_arguments(parser)
    return parser.parse_args(argv)


@contextmanager
def running(config: FleetConfig, model: str, run_dir: Path) -> Iterator[Fleet | None]:
    """A fleet on rank 0, which starts while the rank goes on; None on the others."""
    if not is_main():
        yield None
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with Fleet(config, model, run_dir, seats=seats_of_engine(config, int(os.environ.get("WORLD_SIZE", "1")))) as fleet:
        yield fleet


def seats_of_engine(config: FleetConfig, trainer_ranks: int) -> Seats:
    """The GPUs behind the ranks' for NCCL, which takes no two ranks on one; else the engine may share the first."""
    if config.transport != "nccl":
        return HERE
    return Seats(visible_gpus(range(trainer_ranks, trainer_ranks + config.tensor_parallel)))


@torch.no_grad()
def change_weights(policy: Policy) -> None:
    """Scale each tensor by a factor between 0.75 and 1.25 that its name decides, so that it is the same at any
    layout."""
    for bound in weights.bind(policy.module, policy.shape, policy.topology):
        bound.tensor.mul_(0.75 + zlib.crc32(next(iter(bound.entry.hf)).encode()) % 1000 / 2000)


def greedy(fleet: Fleet, prompts: Tensor) -> list[Rollout]:
    """The answer of each prompt [B, S] at temperature 0."""
    sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
    requests = [Request(f"prompt-{n}", tuple(prompt), sampling) for n, prompt in enumerate(prompts.tolist())]
    return [answers[0] for answers in fleet.generate(requests)]


def first_other_token(ours: Sequence[Rollout], others: Sequence[Rollout]) -> str | None:
    """Where two sets of answers part, as a clause; None when they are equal."""
    for number, (mine, other) in enumerate(zip(ours, others, strict=True)):
        if mine.answer != other.answer:
            place = next((i for i, (a, b) in enumerate(zip(mine.answer, other.answer, strict=False)) if a != b), None)
            if place is None:
                return f"answer {number} has {len(mine.answer)} tokens instead of {len(other.answer)}"
            return f"answer {number}, token {place} is {mine.answer[place]} instead of {other.answer[place]}"
    return None


def compare_logprobs(
    answers: Sequence[Rollout], expected: Sequence[Tensor], tolerance: float
) -> tuple[float, str | None]:
    """Largest difference between the engine's log-probs and those expected, and the first token beyond the
    tolerance."""
    largest, first = 0.0, None
    for number, (answer, values) in enumerate(zip(answers, expected, strict=True)):
        distances = (torch.tensor(answer.rollout_logp) - values).abs()
        largest = max(largest, float(distances.max()))
        wrong = (~(distances <= tolerance)).nonzero()
        if first is None and len(wrong):
            place = int(wrong[0])
            first = f"answer {number}, token {place} ({answer.answer[place]}): differs by {float(distances[place]):.3g}"
    return largest, first


def trainer_logprobs(policy: Policy, answers: Sequence[Rollout]) -> list[Tensor]:
    """The trainer's log-probs of each answer's tokens. Collective."""
    batch = TokenBatch.from_sequences([[*answer.prompt, *answer.answer] for answer in answers])
    parts = policy.logprobs(batch)[0].split(batch.lengths.tolist())
    return [values[len(answer.prompt) :] for values, answer in zip(parts, answers, strict=True)]


def transformers_scores(
    path: Path, answers: Sequence[Rollout], device: torch.device
) -> tuple[list[Tensor], str | None]:
    """Log-probs of the answers by transformers, and the first token that is not its greedy choice."""
    scores, first = [], None
    for number, answer in enumerate(answers):
        tokens = torch.tensor([[*answer.prompt, *answer.answer]])
        logits = transformers_logits(str(path), tokens, device)[0, len(answer.prompt) - 1 : -1]
        chosen = torch.tensor(answer.answer)
        scores.append(logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0])
        other = (logits.argmax(-1) != chosen).nonzero()
        if first is None and len(other):
            place = int(other[0])
            first = f"answer {number}, token {place} is {int(chosen[place])} instead of {int(logits[place].argmax())}"
    return scores, first


@dataclass(frozen=True)
class Evidence:
    """The greedy answers of three engines, and what others think of the middle one's."""

    before: Sequence[Rollout]
    """Of the engine with the checkpoint's own weights."""
    swapped: Sequence[Rollout]
    """Of the same engine with the changed weights."""
    fresh: Sequence[Rollout]
    """Of an engine started on the exported checkpoint."""
    trainer: Sequence[Tensor]
    """The trainer's log-probs of the swapped engine's answers."""
    transformers: Sequence[Tensor]
    other_choice: str | None
    """The first of these tokens that transformers would not have chosen."""
    report: SyncReport


def collect(arguments: argparse.Namespace, config: FleetConfig, folder: Path) -> Evidence | None:
    """Swap weights, sample, export and score. Collective; None on all ranks but 0."""
    shape = ModelShape.from_hf(arguments.hf)
    prompts = seeded_tokens(shape, arguments.seed, PROMPTS, PROMPT_TOKENS)
    with (
        running(config, arguments.hf, folder / "swapped") as fleet,
        ranks(arguments, TrainerConfig(device=arguments.device)) as (topology, parallel),
    ):
        policy = load_policy(arguments.hf, shape, "float32", parallel, TrainerConfig(), topology, None, arguments.seed)
        sync = WeightSync(policy, fleet, config, topology)
        sync.push(1)
        before = on_rank_zero(lambda: greedy(fleet, prompts) if fleet else [])
        change_weights(policy)
        report = sync.push(2)
        swapped = on_rank_zero(lambda: greedy(fleet, prompts) if fleet else [])
        out = on_rank_zero(lambda: folder / "exported")
        export_hf(policy, arguments.hf, out)
        trained = trainer_logprobs(policy, swapped)
    if not is_main():
        return None
    with Fleet(config, str(out), folder / "fresh") as fresh_fleet:
        fresh_fleet.wait_ready()
        fresh_fleet.serve_checkpoint()
        fresh = greedy(fresh_fleet, prompts)
    scored, other_choice = transformers_scores(out, swapped, topology.device)
    return Evidence(before, swapped, fresh, trained, scored, other_choice, report)


def judge(evidence: Evidence, tolerance: float) -> Verdict:
    """Passed when all agree and the answers changed with the weights; else the first token that differs."""
    trainer_distance, trainer_first = compare_logprobs(evidence.swapped, evidence.trainer, tolerance)
    reference_distance, reference_first = compare_logprobs(evidence.swapped, evidence.transformers, tolerance)
    unchanged = first_other_token(evidence.before, evidence.swapped) is None
    checks = {
        "greedy answers of the swapped engine against a fresh one": first_other_token(evidence.swapped, evidence.fresh),
        "log-probs of the swapped engine against the trainer": trainer_first,
        "log-probs of the swapped engine against transformers": reference_first,
        "greedy choices of the swapped engine against transformers": evidence.other_choice,
        "the swapped engine": "its answers did not change with the weights" if unchanged else None,
    }
    problems = [f"{what}: {where}" for what, where in checks.items() if where is not None]
    tokens, report = sum(len(answer.answer) for answer in evidence.swapped), evidence.report
    facts = {
        "answer_tokens": tokens,
        "tensors": report.tensors,
        "bytes": report.bytes,
        "sync_seconds": round(report.seconds, 3),
        "max_logprob_diff_trainer": trainer_distance,
        "max_logprob_diff_transformers": reference_distance,
        "tolerance": tolerance,
        "problems": problems,
    }
    agreed = (
        f"{tokens} greedy tokens after a swap of {report.tensors} tensors equal a fresh engine's; max |log-prob "
        f"difference| {trainer_distance:.2e} to the trainer, {reference_distance:.2e} to transformers"
    )
    return Verdict(not problems, problems[0] if problems else agreed, facts)


def main(argv: Sequence[str]) -> int:
    arguments, started = parse(argv), time.monotonic()
    positions = ModelShape.from_hf(arguments.hf).max_position_embeddings
    config = FleetConfig(
        dtype="float32", max_model_len=min(256, positions), max_num_seqs=8, transport=arguments.transport
    )
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        evidence = collect(arguments, config, Path(folder))
    if evidence is None:
        return PASSED
    return conclude("verify sync", arguments, judge(evidence, arguments.tolerance), started)


if __name__ == "__main__":
    sys.exit(end_with(lambda: main(sys.argv[1:])))
