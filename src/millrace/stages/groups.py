"""What a stage works with: episodes, their answers with rewards, and the groups of answers to one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.environments.base import Cut, Message, Reward
from millrace.rollout.types import Rollout

NOT_SCORED = Reward(0.0, "not scored")


@dataclass(frozen=True)
class Episode:
    """One prompt of one domain, to be answered n times."""

    id: str
    domain: str
    row: Mapping[str, Any]
    messages: Sequence[Message]
    prompt: tuple[int, ...]
    seed: int
    scored: bool = True
    """Whether its answers are given rewards; where a teacher alone speaks of them, they may do without."""
    thinking: bool | None = None
    """The form of the chat template that the prompt was rendered in."""
    turns: bool = False
    """Whether its environment answers the policy, which then answers again."""
    opening: str = ""
    """What of the answer stands in the prompt: the `<think>` that a thinking form opens. Environments read it with the
    answer, or else reasoning that never ends would pass for an answer."""

    @property
    def request_id(self) -> str:
        return f"{self.domain}/{self.id}/{self.seed}"


@dataclass(frozen=True)
class Scored:
    """One answer with its reward."""

    rollout: Rollout
    text: str
    reward: Reward
    cut: Cut | None = None
    """The limit that ended an episode of many turns before its environment did."""


@dataclass(frozen=True)
class Group:
    """All answers to one prompt."""

    episode: Episode
    answers: tuple[Scored, ...]

    @property
    def rewards(self) -> list[float]:
        """Of all answers but the masked ones, whose values say nothing."""
        return [answer.reward.value for answer in self.answers if not answer.reward.masked]
