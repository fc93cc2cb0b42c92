"""What an environment is: it opens an episode with a prompt and answers each of the policy's turns.

A single-turn domain (`Environment`) scores the first answer. One with tools (`TurnEnvironment`) keeps a `Session` for
each episode, which answers each turn with an observation until it gives a reward. In one with an agent of its own
(`AgentEnvironment`) it is the agent who asks the policy, and gives the reward when it is done. Stages and the
evaluation only know these interfaces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, and what a chat template knows besides: tool_calls, tool_call_id."""


@dataclass(frozen=True)
class Observation:
    """The environment's turn: messages to append before the policy answers again."""

    messages: Sequence[Message]


@dataclass(frozen=True)
class Reward:
    """The end of an episode."""

    value: float
    reason: str
    """Why the episode ended with this value, in a few words; shown in the report."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Named partial scores; kept with the answer in the recorded rollouts."""
    masked: bool = False
    """Whether the value says nothing of the answer (its container was lost, its judge could not be had): the answer is
    left out of the loss and of its group's baseline, and counted."""


class Environment(Protocol):
    """One domain whose episodes end with their first answer. `row` is a validated row of its data set."""

    required_fields: Sequence[str]
    """Keys a data row must have; checked when the data set is opened."""

    def validate(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with a row, in one sentence, or None."""
        ...

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """The messages that open an episode."""
        ...

    async def step(self, row: Mapping[str, Any], transcript: Sequence[Message], answer: str) -> Reward:
        """Score the answer. Never raises for what a policy can write; a verifier that takes too long is killed and
        gives a reward of 0 with the reason `timeout`."""
        ...

    async def close(self) -> None:
        """End the processes the environment holds."""
        ...


Cut = Literal["turns", "tokens", "context", "time"]
"""The limit that ended an episode before its environment did: turns, generated tokens, the engine's context, wall
time."""


class Session(Protocol):
    """One episode of a domain with turns, and what of the world belongs to it."""

    async def step(self, answer: str) -> Observation | Reward:
        """Answer the policy's turn. Never raises for what a policy can write: a call that fails is an observation."""
        ...

    async def cut(self, by: Cut) -> Reward:
        """The reward of an episode that a limit ended."""
        ...

    async def close(self) -> None:
        """Free what the session holds; called once, also when it was cancelled in the middle of a step."""
        ...


@runtime_checkable
class TurnEnvironment(Protocol):
    """One domain whose episodes have turns."""

    required_fields: Sequence[str]

    def validate(self, row: Mapping[str, Any]) -> str | None: ...

    def reset(self, row: Mapping[str, Any]) -> list[Message]: ...

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The functions that the chat template offers to the policy, as JSON schemas."""
        ...

    async def open(self, row: Mapping[str, Any]) -> Session:
        """Begin an episode; thousands may be open at one time."""
        ...

    async def close(self) -> None: ...


EPISODE_FIELD = "millrace_episode"
"""Under which the metadata of a request name its episode, where no API key of its own can."""


@dataclass(frozen=True)
class ModelAddress:
    """Where an agent asks the policy on behalf of one episode, as OpenAI's clients take it."""

    base_url: str
    api_key: str
    """The episode's own."""
    model: str


@runtime_checkable
class AgentEnvironment(Protocol):
    """One domain whose episodes are driven by an agent outside of Millrace."""

    required_fields: Sequence[str]
    places: asyncio.Semaphore
    """Of the episodes that the agent is given at one time."""
    listen: str | None
    port: int
    """Where it finds the policy (see `AgentConfig`)."""

    def validate(self, row: Mapping[str, Any]) -> str | None: ...

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """The messages that the row opens with; the agent may well ask the policy something else."""
        ...

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]: ...

    async def drive(self, row: Mapping[str, Any], model: ModelAddress) -> Reward:
        """Have the agent drive one episode to its end. Raises for all that goes wrong with it."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class ReportingEnvironment(Protocol):
    """A domain that says with each batch of rewards how they came about."""

    def summary(self) -> str:
        """What was done to score answers so far, in a sentence for the log."""
        ...


@dataclass(frozen=True)
class Comparison:
    """How the answers of a group are compared with one another, and what their lengths count (see `RlhfStage`)."""

    pairing: Literal["all_pairs", "circular"]
    both_orders: bool
    think_length_weight: float
    answer_length_weight: float
    think_bonus: float
    answer_bonus: float
    bonus_share: float


@runtime_checkable
class GroupEnvironment(Environment, Protocol):
    """A domain whose answers are scored in training by comparing those of a group."""

    held_out_fields: Sequence[str]
    """Keys a held-out row must have; there an answer is scored alone, by `step`."""

    async def score_group(
        self,
        row: Mapping[str, Any],
        transcript: Sequence[Message],
        answers: Sequence[str | None],
        comparison: Comparison,
    ) -> list[Reward]:
        """Rewards of all answers to one prompt; None stands for an answer that was cut at the length limit."""
        ...


AnyEnvironment = Environment | TurnEnvironment | AgentEnvironment
