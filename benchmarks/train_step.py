"""Policy.train_step over a bare Megatron-Core training loop.

Both train the same weights on the same packed batch on the same ranks, with Megatron-Core's data parallelism, schedule
and optimizer and the same layers. The bare loop is the shortest program that does so: GPTModel with labels, hence
vocabulary-parallel cross entropy over the logits of the whole micro-batch, and micro-batches packed beforehand. The
policy besides cuts, balances and packs its batch each step, takes log-probs in chunks whose logits it computes again in
the backward pass, runs a loss over streams, and reduces and checks metrics.

That both do the same work is checked: their losses must agree at every step.

    torchrun --nproc-per-node 2 -m benchmarks.train_step [--rounds 10]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

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
from millrace.megatron.microbatch import MicroBatch, cut_batch
from millrace.megatron.model import transformer_config
from millrace.megatron.optimizer import build_optimizer
from millrace.megatron.policy import Policy
from millrace.megatron.specs import block_spec
from millrace.megatron.topology import Topology, init_distributed


@dataclass(frozen=True)
class BareBatch:
    """A packed micro-batch as Megatron-Core's own data loaders would hand it over."""

    tokens: Tensor
    """int64 [1, T]"""
    labels: Tensor
    """int64 [1, T], the next token"""
    loss_mask: Tensor
    """float32 [1, T], 0 where the next token is of another sequence"""
    packed: PackedSeqParams

    @classmethod
    def of(cls, micro_batch: MicroBatch) -> BareBatch:
        rows = micro_batch.predicting_rows
        labels = torch.zeros_like(micro_batch.tokens).index_copy(0, rows, micro_batch.tokens[rows + 1])
        loss_mask = torch.zeros(labels.shape, device=labels.device).index_fill(0, rows, 1.0)
        return cls(micro_batch.tokens[None], labels[None], loss_mask[None], micro_batch.packed_seq_params())


class BareLoop:
    """Megatron-Core and nothing else around it."""

    def __init__(self, policy: Policy, batches: list[BareBatch]) -> None:
        shape, parallel = policy.shape, policy.parallel
        config = transformer_config(
            shape, parallel, policy.trainer, policy.dtype, policy.topology.device, fused_gradients=True
        )
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, shape.layers, shape.mamba),
            vocab_size=shape.padded_vocab_size(parallel.tp),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
        ).to(policy.topology.device)
        model.load_state_dict(policy.module.state_dict())
        config.finalize_model_grads_func = finalize_model_grads
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        self.model = DistributedDataParallel(config, settings, model)
        self.optimizer = build_optimizer(OPTIMIZER, policy.trainer, policy.dtype, self.model)
        self.batches = batches
        self.losses: list[float] = []

    def step(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(self.batches),
            model=[self.model],
            num_microbatches=len(self.batches),
            seq_length=max(batch.tokens.shape[1] for batch in self.batches),
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()
        total, tokens = (float(sum(part[name] for part in parts)) for name in ("sum", "tokens"))
        self.losses.append(total / tokens)


def _forward(batches: Iterator[BareBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    batch = next(batches)
    output = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch.packed)

    def loss(per_token: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, tokens = (per_token * batch.loss_mask).sum(), batch.loss_mask.sum()
        return total, tokens.int(), {"sum": total.detach(), "tokens": tokens}

    return output, loss


def main(arguments: argparse.Namespace) -> None:
    parallel = parallel_config()
    trainer = TrainerConfig(max_tokens_per_micro_batch=arguments.capacity)
    topology = init_distributed(parallel, trainer, seed=1)
    shape = qwen3_shape(arguments.layers, arguments.hidden, arguments.vocab)
    policy = Policy(model_config(), shape, parallel, trainer, topology, optimizer=OPTIMIZER, seed=1)
    batch = random_batch(arguments, shape.vocab_size)
    bare = BareLoop(policy, [BareBatch.of(m) for m in _same_cut(batch, policy, topology)])
    losses: list[float] = []

    def policy_step() -> None:
        losses.append(policy.train_step(batch, sft_loss_fn())["loss"])

    seconds = race({"policy": policy_step, "bare": bare.step}, arguments.rounds)
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, bare.losses, strict=True))
    if not worst <= arguments.tolerance or not math.isfinite(losses[-1]):
        sys.exit(f"the two loops differ by {worst:.2g} of their loss: they do not do the same work")
    middle, low, high = ratio(seconds, "policy", "bare")
    say(
        f"train step: {shape.parameter_count() / 1e6:.1f}M parameters, TP{topology.tp}, {batch.tokens.numel()} tokens "
        f"in {len(bare.batches)} packed micro-batches, {topology.device.type}, {arguments.rounds} rounds\n"
        f"  losses agree within {worst:.1e}; loss {losses[0]:.4f} -> {losses[-1]:.4f}\n"
        f"  bare Megatron-Core {median(seconds['bare']):.3f} s, Policy.train_step {median(seconds['policy']):.3f} s\n"
        f"  ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
    )
    topology.close()


def random_batch(arguments: argparse.Namespace, vocab: int) -> TokenBatch:
    lengths = lognormal_lengths(arguments.sequences, arguments.median, 0.8, arguments.capacity)
    generator = torch.Generator().manual_seed(2)
    batch = TokenBatch(torch.randint(0, vocab, (sum(lengths),), generator=generator), torch.tensor(lengths))
    mask = torch.ones(sum(lengths)).index_fill(0, batch.offsets[:-1], 0.0)
    return batch.with_streams(weight=token_weights(mask, batch.lengths))


def _same_cut(batch: TokenBatch, policy: Policy, topology: Topology) -> list[MicroBatch]:
    return cut_batch(
        batch,
        dp=topology.dp,
        dp_rank=topology.dp_rank,
        capacity=policy.trainer.max_tokens_per_micro_batch,
        multiple=topology.tp,
        device=topology.device,
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.train_step", description="Policy.train_step over bare Megatron-Core"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--median", type=int, default=96, help="tokens of the middle sequence")
    parser.add_argument("--capacity", type=int, default=512, help="tokens of a micro-batch")
    parser.add_argument("--tolerance", type=float, default=1e-3 if torch.cuda.is_available() else 1e-5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
