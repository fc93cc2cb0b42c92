"""A train step with each signal of MOPD over one with the sampled signal.

All take the same packed batch on the same ranks, half of it taught by one teacher and half by another. Beside the
training itself (cut, forward, head, backward, update) a step needs the teachers' pass over their own sequences: their
log-probs for the sampled signal, their hidden states for the others. Both are measured, apart and together.

The sampled signal takes the student's logits twice, in forward and backward. The others take the teacher's besides, so
that a small model with a large vocabulary pays most.

    torchrun --nproc-per-node 2 -m benchmarks.distillation [--rounds 10]
"""

from __future__ import annotations

import argparse
import math
import sys
from statistics import median

import torch

from benchmarks.setting import (
    OPTIMIZER,
    lognormal_lengths,
    model_config,
    parallel_config,
    qwen3_shape,
    race,
    ratio,
    say,
)
from millrace.algorithms.aggregation import token_weights
from millrace.algorithms.distillation import mopd_loss_fn
from millrace.config.schema import TrainerConfig
from millrace.data.batch import TokenBatch
from millrace.megatron.divergence import Divergence
from millrace.megatron.policy import Policy
from millrace.megatron.topology import init_distributed

TEACHERS = ("first", "second")


class Signal:
    """The steps of one signal: the teachers' pass, and the training from what it gave."""

    def __init__(self, student: Policy, teacher: Policy, batch: TokenBatch, top_k: dict | None) -> None:
        self.student, self.teacher, self.batch, self.top_k = student, teacher, batch, top_k
        self.loss_fn = mopd_loss_fn("sampled" if top_k is None else "full", teachers=TEACHERS)
        self.divergence: Divergence | None = None
        self.losses: list[float] = []

    def teach(self) -> None:
        """One teacher model stands for both: what is timed is a pass over the sequences of each."""
        if self.top_k is not None:
            states = [self.teacher.teacher_states(self.batch, number) for number in (1, 2)]
            self.divergence = Divergence(states, **self.top_k)
            return
        found, ids, taught = (
            torch.zeros(self.batch.tokens.numel()),
            self.batch.segment_ids,
            self.batch.streams["taught"],
        )
        for number in (1, 2):
            own = ids[taught == number].unique().tolist()
            found[self.batch.positions(own)] = self.teacher.logprobs(self.batch.select(own))[0]
        self.batch = self.batch.with_streams(teacher_logp=found)

    def train(self) -> None:
        metrics = self.student.train_step(self.batch, self.loss_fn, entropy=True, divergence=self.divergence)
        self.losses.append(metrics["loss"])


def main(arguments: argparse.Namespace) -> None:
    parallel = parallel_config()
    trainer = TrainerConfig(max_tokens_per_micro_batch=arguments.capacity)
    topology = init_distributed(parallel, trainer, seed=1)
    shape = qwen3_shape(arguments.layers, arguments.hidden, arguments.vocab)
    student = Policy(model_config(), shape, parallel, trainer, topology, optimizer=OPTIMIZER, seed=1)
    batch = taught_batch(student, arguments)
    of_top_k = {"top_k": arguments.top_k}
    options = {
        "sampled": None,
        "top_k, student": {**of_top_k, "support": "student"},
        "top_k, teacher": {**of_top_k, "support": "teacher"},
        "full": {},
    }
    teacher = student.frozen_twin()
    signals = {name: Signal(student, teacher, batch, top_k) for name, top_k in options.items()}
    teaching = race({name: signal.teach for name, signal in signals.items()}, arguments.rounds)
    training = race({name: signal.train for name, signal in signals.items()}, arguments.rounds)
    if not all(math.isfinite(loss) for signal in signals.values() for loss in signal.losses):
        sys.exit("a loss is not finite")
    say(
        f"distillation: {shape.parameter_count() / 1e6:.1f}M parameters, vocabulary {arguments.vocab}, "
        f"TP{topology.tp}, {batch.tokens.numel()} tokens, k = {arguments.top_k}, {topology.device.type}, "
        f"{arguments.rounds} rounds"
    )
    both = {name: [a + b for a, b in zip(teaching[name], training[name], strict=True)] for name in signals}
    for name in signals:
        parts = [_over_sampled(seconds, name) for seconds in (training, teaching, both)]
        say(f"  {name:15} train step {parts[0]}, teachers' pass {parts[1]}, both {parts[2]}")
    topology.close()


def _over_sampled(seconds: dict[str, list[float]], name: str) -> str:
    middle, low, high = ratio(seconds, name, "sampled")
    return f"{median(seconds[name]):.3f} s, ratio {middle:.2f} ({low:.2f} to {high:.2f})"


def taught_batch(student: Policy, arguments: argparse.Namespace) -> TokenBatch:
    """Sequences taught in turn by the two teachers, the first quarter of each a prompt; rollouts agree with the
    student."""
    lengths = torch.tensor(lognormal_lengths(arguments.sequences, arguments.median, 0.8, arguments.capacity))
    tokens = torch.randint(0, arguments.vocab, (int(lengths.sum()),), generator=torch.Generator().manual_seed(2))
    batch = TokenBatch(tokens, lengths)
    place = torch.arange(tokens.numel()) - batch.offsets[batch.segment_ids]
    mask = place >= (lengths // 4).clamp(min=1)[batch.segment_ids]
    return batch.with_streams(
        weight=token_weights(mask, lengths, "sequence"),
        taught=(batch.segment_ids % 2 + 1).float(),
        advantage=torch.zeros(tokens.numel()),
        rollout_logp=student.logprobs(batch)[0],
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.distillation", description="A train step with each signal of MOPD over the sampled one"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--median", type=int, default=96, help="tokens of the middle sequence")
    parser.add_argument("--capacity", type=int, default=512, help="tokens of a micro-batch")
    parser.add_argument("--top-k", type=int, default=64)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
