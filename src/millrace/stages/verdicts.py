"""Rewards that could not be had: how many of a batch, and how many are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from millrace.environments.judge import WAY_OUT_OF_UNPARSABLE, JudgeError
from millrace.errors import MillraceError
from millrace.stages.groups import Group

MOST_MASKED = 0.5
"""Share of a batch's answers in a domain that may be masked: of more the fault is the environment's, or the machine's,
and what is left tells little of the policy."""


class TooManyMasked(MillraceError):
    """Most answers of a batch could be given no reward."""


def masked(domain: str, groups: Sequence[Group]) -> str | None:
    """How many answers of a domain are masked, in a sentence; None where none is."""
    answers = [answer for group in groups if group.episode.domain == domain for answer in group.answers]
    reasons = Counter(answer.reward.reason for answer in answers if answer.reward.masked)
    if not reasons:
        return None
    why = reasons.most_common(1)[0][0]
    return f"{reasons.total()} of {len(answers)} answers in {domain} are masked, most often: {why}"


def require_unmasked(domain: str, groups: Sequence[Group], what: str) -> None:
    """Raises TooManyMasked when more than MOST_MASKED of a domain's answers are."""
    answers = [answer.reward.masked for group in groups if group.episode.domain == domain for answer in group.answers]
    if sum(answers) > MOST_MASKED * len(answers):
        raise TooManyMasked(
            f"{what}: {masked(domain, groups)}. That is more than {100 * MOST_MASKED:.0f}%, so what is left would tell "
            "little of the policy; see to the cause, then start again: the run resumes"
        )


def undecided(groups: Sequence[Group]) -> str | None:
    """How many verdicts of judges could not be had, in a sentence; None where all could."""
    verdicts, failed, unparsable = _verdicts(groups)
    if not failed + unparsable:
        return None
    lost = (failed + unparsable) / verdicts
    return (
        f"{100 * lost:.1f}% of the judge's verdicts stand undecided ({100 * failed / verdicts:.1f}% unanswered, "
        f"{100 * unparsable / verdicts:.1f}% unparsable)"
    )


def require_a_verdict(domain: str, groups: Sequence[Group], what: str) -> None:
    """One verdict that could not be had may be bad luck (it is on record with both of its answers); several are not."""
    verdicts, failed, unparsable = _verdicts(groups)
    if verdicts > 2 and failed + unparsable == verdicts:
        raise JudgeError(
            f"{what}: the judge of {domain} decided not one verdict ({100 * failed / verdicts:.0f}% unanswered, "
            f"{100 * unparsable / verdicts:.0f}% unparsable), so the rewards would tell nothing of the answers; "
            f"see that it answers; {WAY_OUT_OF_UNPARSABLE}"
        )


def _verdicts(groups: Sequence[Group]) -> tuple[float, float, float]:
    """Verdicts on record with the answers, and how many of them failed and were unparsable."""
    details = [answer.reward.details for group in groups for answer in group.answers]
    verdicts, failed, unparsable = (
        sum(each.get(name, 0.0) for each in details) for name in ("verdicts", "failed", "unparsable")
    )
    return verdicts, failed, unparsable
