"""From pairwise verdicts of a judge to one reward an answer.

    tie-break     if s_i = s_j:  s_i <- s_i + 3.5 - s_r,   s_j <- s_j + s_r - 3.5
    base          b_i = mean of s_i over the comparisons that i took part in
    length        w_i = 1 - (l_i - l_min) / (l_max - l_min),  0 for all if l_max = l_min
                  h_i = w_i - mean(w_1..w_G)
    reward        R_i = b_i + bonus_i + c_think h_i(reasoning) + c_answer h_i(answer)

Nemotron-3-Nano, arXiv 2512.20848, equations 2 to 6, which Nemotron-Cascade 2, arXiv 2603.19220, section 4.5, takes over
with every pair of a group compared. s_i, s_j are scores from 1 to 5; the ranking s_r goes from 1, the answer that was
shown first is far better, to 6, the second one is. Lengths are in characters.

The quality-gated bonus: the answer with the shortest non-empty reasoning, and the one with the shortest non-empty final
text, gain a constant if their base is among the best `share` of the group, that is at least the base at place
int(G * share) of the descending order. Where that is place 0, a group too small for the share, the best base is asked
for. Answers of the same shortest length are treated alike.

What the report leaves open, an answer without final text: nobody compares it, its base is the lowest that a comparison
can give, and it counts as the longest of its group. So no finished answer of its group has a lower reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Pairing = Literal["all_pairs", "circular"]

MIDDLE_SCORE, MIDDLE_RANKING = 3.0, 3.5
LOWEST_BASE = 1.0 + MIDDLE_RANKING - 6.0
"""Of a comparison in which both answers get score 1 and the ranking decides as clearly as it can."""


@dataclass(frozen=True)
class Judgement:
    """What a judge says of two answers in the order in which it saw them."""

    score_1: float
    score_2: float
    """From 1 to 5."""
    ranking: float
    """From 1, the first is far better, to 6, the second is."""


UNDECIDED = Judgement(MIDDLE_SCORE, MIDDLE_SCORE, MIDDLE_RANKING)
"""Stands for a judgement that could not be had."""


@dataclass(frozen=True)
class PreferenceReward:
    """The reward of one answer and what it is the sum of."""

    base: float
    bonus: float
    think_length: float
    answer_length: float

    @property
    def value(self) -> float:
        return self.base + self.bonus + self.think_length + self.answer_length


def comparison_pairs(count: int, *, pairing: Pairing, both_orders: bool) -> list[tuple[int, int]]:
    """Which of `count` answers are compared, each pair in the order in which it is shown.

    all_pairs compares each with every other, circular each with the next one around a circle.
    """
    if pairing == "all_pairs" or count < 3:  # around a circle of two there is one pair
        pairs = list(combinations(range(count), 2))
    else:
        pairs = [(i, (i + 1) % count) for i in range(count)]
    return pairs + [(j, i) for i, j in pairs] if both_orders else pairs


def comparison_scores(judgement: Judgement) -> tuple[float, float]:
    """Scores of the two answers of a comparison; where they tie, the ranking moves them apart."""
    first, second = judgement.score_1, judgement.score_2
    if first == second:
        return first + MIDDLE_RANKING - judgement.ranking, second + judgement.ranking - MIDDLE_RANKING
    return first, second


def base_rewards(count: int, pairs: Sequence[tuple[int, int]], judgements: Sequence[Judgement]) -> list[float]:
    """Mean score of each of `count` answers over its comparisons; the middle of the scale for one that has none."""
    scores: list[list[float]] = [[] for _ in range(count)]
    for (i, j), judgement in zip(pairs, judgements, strict=True):
        first, second = comparison_scores(judgement)
        scores[i].append(first)
        scores[j].append(second)
    return [sum(own) / len(own) if own else MIDDLE_SCORE for own in scores]


def length_rewards(lengths: Sequence[int]) -> list[float]:
    """Centred rewards in [-1, 1] of the lengths of a group: the shorter, the higher."""
    low, high = min(lengths), max(lengths)
    if low == high:
        return [0.0] * len(lengths)
    weights = [1 - (length - low) / (high - low) for length in lengths]
    mean = sum(weights) / len(weights)
    return [weight - mean for weight in weights]


def bonus_threshold(bases: Sequence[float], share: float) -> float:
    """The base that an answer needs for a bonus: that of the last among the best `share`, but one answer at least."""
    best = int(len(bases) * share + 1e-9)  # 100 * 0.29 is 28.999...
    return sorted(bases, reverse=True)[max(best, 1) - 1]


def shortest_bonus(lengths: Sequence[int], bases: Sequence[float], *, amount: float, share: float) -> list[float]:
    """`amount` for the shortest non-empty answers of a group whose base reaches the threshold, 0 for the others."""
    shortest = min((length for length in lengths if length > 0), default=None)
    threshold = bonus_threshold(bases, share)
    return [
        amount if length == shortest and base >= threshold else 0.0 for length, base in zip(lengths, bases, strict=True)
    ]


def preference_rewards(
    bases: Sequence[float | None],
    think_lengths: Sequence[int],
    answer_lengths: Sequence[int],
    *,
    think_length_weight: float,
    answer_length_weight: float,
    think_bonus: float,
    answer_bonus: float,
    bonus_share: float,
) -> list[PreferenceReward]:
    """Rewards of the answers of one group.

    bases: from `base_rewards`, None for an answer without final text, whose lengths are not looked at.
    """
    known = [LOWEST_BASE if base is None else base for base in bases]
    finished = [base is not None for base in bases]
    bonuses, controlled = [], []
    for lengths, weight, bonus in (
        (think_lengths, think_length_weight, think_bonus),
        (answer_lengths, answer_length_weight, answer_bonus),
    ):
        eligible = [length if done else 0 for length, done in zip(lengths, finished, strict=True)]
        bonuses.append(shortest_bonus(eligible, known, amount=bonus, share=bonus_share))
        counted = _unfinished_as_longest(lengths, finished)
        controlled.append([weight * reward for reward in length_rewards(counted)])
    return [
        PreferenceReward(base, sum(bonus), think, answer)
        for base, bonus, think, answer in zip(known, zip(*bonuses, strict=True), *controlled, strict=True)
    ]


def _unfinished_as_longest(lengths: Sequence[int], finished: Sequence[bool]) -> list[int]:
    longest = max((length for length, done in zip(lengths, finished, strict=True) if done), default=0)
    return [length if done else longest for length, done in zip(lengths, finished, strict=True)]


def win_rate(forward: Judgement, swapped: Judgement) -> float:
    """How an answer fares against another that it was shown before (`forward`) and behind (`swapped`): 1 for a win, 0.5
    for a ranking in the middle, 0 for a loss; the mean of the two."""
    return (_win(forward.ranking) + _win(2 * MIDDLE_RANKING - swapped.ranking)) / 2


def _win(ranking: float) -> float:
    if ranking == MIDDLE_RANKING:
        return 0.5
    return float(ranking < MIDDLE_RANKING)
