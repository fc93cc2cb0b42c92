"""Supervised fine-tuning: packed conversations, loss on the assistant's tokens, mean over the global batch's tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from millrace.algorithms.aggregation import token_weights
from millrace.algorithms.losses import sft_loss_fn
from millrace.config.schema import SftStage
from millrace.data.batch import TokenBatch
from millrace.data.datasets import ConversationDataset
from millrace.data.sampler import EpochSampler
from millrace.data.tokenizer import ChatTokenizer
from millrace.stages.context import Progress, StageContext

TELL_SECONDS = 10.0
"""How often is said how much of the data has been read."""


def run_sft(stage: SftStage, ctx: StageContext, progress: Progress) -> None:
    """Train to the stage's end from `progress`. Collective; rank 0 alone has the data."""
    data = ctx.conversations.get(stage.name)
    size = ctx.control.on_main(lambda: len(data) if data else 0)
    if data:
        dropped = f", {data.dropped} overlong ones left out" if data.dropped else ""
        sequences = f", {len(data)} training sequences" if len(data) + data.dropped != data.conversations else ""
        ctx.say(f"{stage.name}: {data.conversations} conversations{sequences}, {sum(data.lengths):,} tokens{dropped}")
    sampler = EpochSampler(size, seed=ctx.recipe.seed + progress.stage)
    if progress.sampler is not None:
        sampler.load_state_dict(progress.sampler)
    steps = total_steps(stage, size)
    ctx.begin_stage(stage, progress, steps)
    loss_fn = sft_loss_fn()
    for step in range(progress.step, steps):
        with ctx.timed("data"):
            indices = sampler.next(stage.global_batch)
            batch = ctx.control.broadcast_batch(sft_batch(data, indices) if data else None)
        ctx.rest_engines()
        with ctx.timed("train"):
            metrics = ctx.policy.train_step(batch, loss_fn)
        ctx.end_step(stage, Progress(progress.stage, step + 1, sampler.state_dict()), steps, metrics)


def open_conversations(
    stage: SftStage, tokenizer: ChatTokenizer, say: Callable[[str], object], index: Path | None = None
) -> ConversationDataset:
    """The stage's data, every row of which is rendered unless `index` keeps what that showed; says how far it is from
    time to time."""
    told = time.monotonic()

    def on_row(done: int, rows: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            say(f"{stage.name}: {done:,} of {rows:,} conversations read")

    return ConversationDataset(
        stage.data,
        tokenizer,
        max_length=stage.max_length,
        drop_overlong=stage.drop_overlong,
        thinking=stage.thinking,
        index=index,
        on_row=on_row,
    )


def total_steps(stage: SftStage, sequences: int) -> int:
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None, "the recipe's rules ask for steps or epochs"
    return math.ceil(stage.epochs * sequences / stage.global_batch)


def sft_batch(data: ConversationDataset, indices: list[int]) -> TokenBatch:
    """Sequences behind one another, each trained token weighted by one over their number in the whole batch."""
    rows = [data[i] for i in indices]
    batch = TokenBatch.from_sequences([row.tokens for row in rows], {"mask": [row.loss_mask for row in rows]})
    return batch.with_streams(weight=token_weights(batch.streams["mask"], batch.lengths, kind="token"))
