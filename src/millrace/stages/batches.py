"""From scored groups of answers to the batch that the policy trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from millrace.algorithms.advantages import group_advantages
from millrace.algorithms.aggregation import token_weights
from millrace.config.schema import AdvantageConfig
from millrace.data.batch import TokenBatch
from millrace.stages.groups import Group


def answer_advantages(groups: Sequence[Group], config: AdvantageConfig) -> list[float]:
    """The group-relative advantage of each answer, one group after the other."""
    return [advantage for group in groups for advantage in _group_advantages(group, config)]


def _group_advantages(group: Group, config: AdvantageConfig) -> list[float]:
    """Masked answers have none and are no part of the baseline; one answer alone has nothing to be compared with."""
    rewards = group.rewards
    if len(rewards) < 2:
        return [0.0] * len(group.answers)
    values = torch.tensor([rewards], dtype=torch.float64)
    compared = iter(group_advantages(values, baseline=config.baseline, scale=config.scale)[0].tolist())
    return [0.0 if answer.reward.masked else next(compared) for answer in group.answers]


def answers_batch(
    groups: Sequence[Group],
    *,
    advantages: Sequence[float],
    drop_overlong: bool,
    aggregation: Literal["token", "sequence"],
    taught: Sequence[int] | None = None,
) -> TokenBatch:
    """Prompts with their answers, with the streams `weight`, `mask`, `advantage` and `rollout_logp`, which are 0 at the
    tokens of prompts and environments. Masked answers are left out of the loss.

    Args:
        advantages: of each answer, one group after the other; every token that the policy generated has it.
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
        dropped = answer.reward.masked or (drop_overlong and rollout.finish_reason == "length")
        before, generated = [0.0] * len(rollout.prompt), rollout.generated()
        tokens.append(rollout.prompt + rollout.answer)
        streams["rollout_logp"].append(before + list(rollout.rollout_logp))
        for name, value in (("mask", float(not dropped)), ("advantage", advantage), ("taught", float(teacher))):
            streams[name].append(before + [value if own else 0.0 for own in generated])
    if taught is None:
        del streams["taught"]
    batch = TokenBatch.from_sequences(tokens, streams)
    return batch.with_streams(weight=token_weights(batch.streams["mask"], batch.lengths, kind=aggregation))
