"""Training tokens per second of packed over padded batches, on the real Policy.

Lengths are log-normal, as those of answers are. The padded batches go through the same policy as sequences of equal
length whose padding carries weight 0, so that nothing but the padding differs. Only tokens of the data count.

    packed                              sequences behind one another
    to the longest of the batch         every sequence padded to the longest of the global batch
    to the longest of the micro-batch   sequences in the order of arrival, `--group` at a time, padded to their longest

    torchrun --nproc-per-node 1 -m benchmarks.packing [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
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
from millrace.algorithms.losses import sft_loss_fn
from millrace.config.schema import TrainerConfig
from millrace.data.batch import TokenBatch
from millrace.megatron.policy import Policy
from millrace.megatron.topology import Topology, init_distributed

PACKED, TO_BATCH, TO_MICRO_BATCH = "packed", "to the longest of the batch", "to the longest of the micro-batch"


def main(arguments: argparse.Namespace) -> None:
    parallel, trainer = parallel_config(), TrainerConfig(max_tokens_per_micro_batch=arguments.capacity)
    topology = init_distributed(parallel, trainer, seed=1)
    shape = qwen3_shape(arguments.layers, arguments.hidden, arguments.vocab)
    policy = Policy(model_config(), shape, parallel, trainer, topology, optimizer=OPTIMIZER, seed=1)
    lengths = lognormal_lengths(arguments.sequences, arguments.median, arguments.sigma, arguments.capacity)
    batches = {
        PACKED: padded_batch(lengths, lengths, shape.vocab_size),
        TO_BATCH: padded_batch(lengths, [max(lengths)] * len(lengths), shape.vocab_size),
        TO_MICRO_BATCH: padded_batch(lengths, longest_of_group(lengths, arguments.group), shape.vocab_size),
    }
    require_same_loss(policy, batches, arguments.tolerance)
    steps = {name: partial(policy.train_step, batch, sft_loss_fn()) for name, batch in batches.items()}
    seconds = race(steps, arguments.rounds, warm_up=1)
    report(lengths, batches, seconds, topology)
    topology.close()


def padded_batch(lengths: Sequence[int], padded: Sequence[int], vocab: int) -> TokenBatch:
    """Random sequences of the given lengths, each followed by padding of weight 0 up to its padded length."""
    generator = torch.Generator().manual_seed(2)
    tokens, mask = [], []
    for length, whole in zip(lengths, padded, strict=True):
        own = torch.randint(0, vocab, (length,), generator=generator)
        tokens.append(torch.cat([own, own.new_zeros(whole - length)]))
        position = torch.arange(whole)
        mask.append(((position > 0) & (position < length)).float())
    batch = TokenBatch(torch.cat(tokens), torch.tensor(list(padded)))
    return batch.with_streams(weight=token_weights(torch.cat(mask), batch.lengths))


def longest_of_group(lengths: Sequence[int], size: int) -> list[int]:
    """For each sequence the longest of its group of `size` sequences, in the order given."""
    return [max(lengths[i - i % size : i - i % size + size]) for i in range(len(lengths))]


def require_same_loss(policy: Policy, batches: dict[str, TokenBatch], tolerance: float) -> None:
    losses = {name: -float((b.streams["weight"] * policy.logprobs(b)[0]).sum()) for name, b in batches.items()}
    for name, loss in losses.items():
        if not abs(loss - losses[PACKED]) <= tolerance * losses[PACKED]:
            sys.exit(f"{name}: loss {loss:.6f}, packed {losses[PACKED]:.6f}: padding changed what is trained on")


def report(
    lengths: Sequence[int], batches: dict[str, TokenBatch], seconds: dict[str, list[float]], topology: Topology
) -> None:
    tokens = sum(lengths)
    say(
        f"packing: {len(lengths)} log-normal sequences, {tokens} tokens (mean {tokens / len(lengths):.0f}, longest "
        f"{max(lengths)}), TP{topology.tp}, {topology.device.type}, {len(seconds[PACKED])} rounds"
    )
    for name, batch in batches.items():
        took, computed = median(seconds[name]), batch.tokens.numel()
        say(f"  {name:34} {took:7.3f} s  {tokens / took:8.0f} tokens/s  {tokens / computed:4.0%} of computed are data")
    for name in (TO_BATCH, TO_MICRO_BATCH):
        middle, low, high = ratio(seconds, name, PACKED)
        say(f"  packed over padded {name}: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.packing", description="Packed over padded tokens/s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--median", type=int, default=96, help="tokens of the middle sequence")
    parser.add_argument("--sigma", type=float, default=0.8, help="spread of the logarithm of the lengths")
    parser.add_argument("--capacity", type=int, default=1024, help="tokens of a micro-batch, and the longest sequence")
    parser.add_argument("--group", type=int, default=4, help="sequences padded together in the order of arrival")
    parser.add_argument("--tolerance", type=float, default=1e-2 if torch.cuda.is_available() else 1e-5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
