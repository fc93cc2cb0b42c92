"""RLHF: the loop of `rl.py`, with rewards from a judge that compares the answers of a group.

Nemotron-Cascade 2, arXiv 2603.19220, section 4.5: all pairs of a group are compared by a generative reward model, and
GRPO trains on the outcome with a k3 KL term of 0.03 to the policy at the stage's start, the only stage with one. What a
stage says beyond `type: rl` is how the comparisons make a reward, which is here.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """What the judge did for these groups; nothing where they are not such as a judge compares."""
    judged = [a.reward.details for group in groups for a in group.answers if "r_base" in a.reward.details]
    compared = [details for details in judged if details["verdicts"]]
    if not compared:
        return {"judge/verdicts": 0.0} if judged else {}
    seen = sum(details["verdicts"] for details in compared)

    def share(name: str) -> float:
        return sum(details[name] for details in compared) / seen

    return {
        "judge/verdicts": seen / 2,  # each is on record with both of its answers
        "judge/failed": share("failed"),
        "judge/unparsable": share("unparsable"),
        "judge/first_wins": share("first_wins"),
        "judge/seconds": share("seconds"),
        "judge/score": sum(details["r_base"] for details in compared) / len(compared),
    }
