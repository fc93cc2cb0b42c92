"""From scored groups of answers to the batch that the policy trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from millrace.algorithms.advantages import group_advantages
from millrace.algorithms.aggregation import token_weights
from millrace.config.schema import AdvantageConfig
from millrace.data.batch import TokenBatch
from millrace.stages.episodes import Group


def answer_advantages(groups: Sequence[Group], config: AdvantageConfig) -> list[float]:
    """The group-relative advantage of each answer, one group after the other."""
    if not groups:
        return []
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    return group_advantages(rewards, baseline=config.baseline, scale=config.scale).flatten().tolist()


def answers_batch(
    groups: Sequence[Group],
    *,
    advantages: Sequence[float],
    drop_overlong: bool,
    aggregation: Literal["token", "sequence"],
    taught: Sequence[int] | None = None,
) -> TokenBatch:
    """Prompts with their answers, with the streams `weight`, `mask`, `advantage` and `rollout_logp`.

    Args:
        advantages: of each answer, one group after the other; every token of an answer has it.
        drop_overlong: leave answers that reached the length limit out of the loss.
        aggregation: how the tokens' weights make a mean (see `algorithms.aggregation`).
        taught: number of the teacher of each answer, counted from 1, or 0; given, there is a stream `taught`.
    """
    answers = [answer for group in groups for answer in group.answers]
    numbers = taught if taught is not None else [0] * len(answers)
    tokens: list[tuple[int, ...]] = []
    streams: dict[str, list[list[float]]] = {"mask": [], "advantage": [], "rollout_logp": [], "taught": []}
    for answer, advantage, teacher in zip(answers, advantages, numbers, strict=True):
        rollout = answer.rollout
        before, length = [0.0] * len(rollout.prompt), len(rollout.answer)
        kept = 0.0 if drop_overlong and rollout.finish_reason == "length" else 1.0
        tokens.append(rollout.prompt + rollout.answer)
        streams["mask"].append(before + [kept] * length)
        streams["advantage"].append(before + [advantage] * length)
        streams["rollout_logp"].append(before + list(rollout.rollout_logp))
        streams["taught"].append(before + [float(teacher)] * length)
    if taught is None:
        del streams["taught"]
    batch = TokenBatch.from_sequences(tokens, streams)
    return batch.with_streams(weight=token_weights(batch.streams["mask"], batch.lengths, kind=aggregation))
