"""RLHF: the loop of `rl.py`, with rewards from a judge that compares the answers of a group.

Nemotron-Cascade 2, arXiv 2603.19220, section 4.5: all pairs of a group are compared by a generative reward model, and
GRPO trains on the outcome with a k3 KL term of 0.03 to the policy at the stage's start, the only stage with one. What a
stage says beyond `type: rl` is how the comparisons make a reward, which is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from millrace.config.schema import RlhfStage, SamplingStage
from millrace.environments.base import Comparison
from millrace.stages.groups import Group


def comparison(stage: SamplingStage) -> Comparison | None:
    """How the answers of a group are compared; None in a stage that scores each alone."""
    if not isinstance(stage, RlhfStage):
        return None
    return Comparison(
        pairing=stage.pairing,
        both_orders=stage.both_orders,
        think_length_weight=stage.think_length_weight,
        answer_length_weight=stage.answer_length_weight,
        think_bonus=stage.think_bonus,
        answer_bonus=stage.answer_bonus,
        bonus_share=stage.bonus_share,
    )


def judge_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What judges did for these groups; nothing where nobody judges them."""
    judged = [a.reward.details for group in groups for a in group.answers if "verdicts" in a.reward.details]
    asked = [details for details in judged if details["verdicts"]]
    compared = [details for details in asked if "r_base" in details]
    if not asked:
        return {"judge/verdicts": 0.0} if judged else {}

    def share(name: str, of: Sequence[Mapping[str, float]]) -> float:
        return sum(details[name] for details in of) / sum(details["verdicts"] for details in of)

    metrics = {
        # A comparison is on record with both of its answers.
        "judge/verdicts": sum(details["verdicts"] / (2 if "r_base" in details else 1) for details in asked),
        "judge/failed": share("failed", asked),
        "judge/unparsable": share("unparsable", asked),
        "judge/seconds": share("seconds", asked),
    }
    if not compared:
        return metrics
    score = sum(details["r_base"] for details in compared) / len(compared)
    return {**metrics, "judge/first_wins": share("first_wins", compared), "judge/score": score}
