"""Answers compared by a generative reward model, for RLHF (Nemotron-Cascade 2, arXiv 2603.19220, section 4.5).

A row has `prompt`. In training the answers of a group are compared with one another; the comparisons' scores, the
lengths and a bonus for short good answers make the reward (`algorithms.preferences`). On its own, as held-out answers
are measured, an answer is compared with the row's `reference` in both orders, and the value is its win rate.

The judge sees the conversation and the final answers, never the reasoning. An answer that was cut at the length limit,
or has no final text, is not shown: it loses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.algorithms.preferences import (
    MIDDLE_RANKING,
    PreferenceReward,
    base_rewards,
    comparison_pairs,
    preference_rewards,
    win_rate,
)
from millrace.environments.answer import final_text, reasoning_text
from millrace.environments.base import Comparison, Message, Reward
from millrace.environments.judge import Judge, Verdict
from millrace.environments.prompts import opening_messages, prompt_problem
from millrace.errors import MillraceError

NO_ANSWER = "no final answer"


class NothingToCompare(MillraceError):
    """A single answer has no reference to be compared with."""


class GenrmEnvironment:
    required_fields: Sequence[str] = ("prompt",)
    held_out_fields: Sequence[str] = ("prompt", "reference")

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def validate(self, row: Mapping[str, Any]) -> str | None:
        if "reference" in row and not (isinstance(row["reference"], str) and final_text(row["reference"]).strip()):
            return "reference must be a non-empty string, the answer that others are compared with"
        return prompt_problem(row["prompt"])

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        return opening_messages(row["prompt"])

    async def score_group(
        self,
        row: Mapping[str, Any],
        transcript: Sequence[Message],
        answers: Sequence[str | None],
        comparison: Comparison,
    ) -> list[Reward]:
        """Rewards of the answers to one prompt by comparing them; None stands for one that was cut."""
        texts = ["" if answer is None else final_text(answer).strip() for answer in answers]
        shown = [index for index, text in enumerate(texts) if text]
        pairs = comparison_pairs(len(shown), pairing=comparison.pairing, both_orders=comparison.both_orders)
        verdicts = await asyncio.gather(
            *(self._judge.compare(transcript, texts[shown[i]], texts[shown[j]]) for i, j in pairs)
        )
        scores = base_rewards(len(shown), pairs, [verdict.judgement for verdict in verdicts])
        bases = dict(zip(shown, scores, strict=True))
        rewards = preference_rewards(
            [bases.get(index) for index in range(len(answers))],
            [len(reasoning_text(answer or "").strip()) for answer in answers],
            [len(text) for text in texts],
            think_length_weight=comparison.think_length_weight,
            answer_length_weight=comparison.answer_length_weight,
            think_bonus=comparison.think_bonus,
            answer_bonus=comparison.answer_bonus,
            bonus_share=comparison.bonus_share,
        )
        own: list[list[Verdict]] = [[] for _ in answers]
        for pair, verdict in zip(pairs, verdicts, strict=True):
            for index in pair:
                own[shown[index]].append(verdict)
        return [_group_reward(reward, bool(text), v) for reward, text, v in zip(rewards, texts, own, strict=True)]

    async def step(self, row: Mapping[str, Any], transcript: Sequence[Message], answer: str) -> Reward:
        """The win rate of an answer against the row's reference.

        Raises:
            NothingToCompare: the row has no reference.
        """
        if "reference" not in row:
            raise NothingToCompare(
                "genrm: a single answer is compared with the `reference` of its row, and this row has none; add it"
            )
        text, reference = final_text(answer).strip(), final_text(row["reference"]).strip()
        if not text:
            return Reward(0.0, NO_ANSWER, _tally([]))
        forward, swapped = await asyncio.gather(
            self._judge.compare(transcript, text, reference), self._judge.compare(transcript, reference, text)
        )
        value = win_rate(forward.judgement, swapped.judgement)
        reason = f"against the reference: rankings {forward.judgement.ranking:g}, {swapped.judgement.ranking:g} swapped"
        return Reward(value, reason, _tally([forward, swapped]))

    async def close(self) -> None:
        await self._judge.close()


def _group_reward(reward: PreferenceReward, finished: bool, verdicts: Sequence[Verdict]) -> Reward:
    length = reward.think_length + reward.answer_length
    reason = f"{reward.base:.2f} in {len(verdicts)} comparisons, length {length:+.2f}, bonus {reward.bonus:+.2f}"
    details = {
        "r_base": reward.base,
        "bonus": reward.bonus,
        "think_length": reward.think_length,
        "answer_length": reward.answer_length,
        **_tally(verdicts),
    }
    return Reward(reward.value, reason if finished else NO_ANSWER, details)


def _tally(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """What became of the verdicts that one answer took part in."""
    return {
        "verdicts": float(len(verdicts)),
        "failed": float(sum(verdict.outcome == "failed" for verdict in verdicts)),
        "unparsable": float(sum(verdict.outcome == "unparsable" for verdict in verdicts)),
        "first_wins": float(sum(verdict.judgement.ranking < MIDDLE_RANKING for verdict in verdicts)),
        "seconds": sum(verdict.seconds for verdict in verdicts),
    }
