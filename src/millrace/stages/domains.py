"""A domain of the recipe with its data: from a row to an episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.config.schema import CurriculumConfig, DomainConfig
from millrace.data.curriculum import ChosenRows, choose_rows, rates_of_rows, read_pass_rates
from millrace.data.datasets import Check, PromptDataset, Read, as_written
from millrace.data.errors import DataError
from millrace.data.messages import form_problem
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import AgentEnvironment, AnyEnvironment, GroupEnvironment, TurnEnvironment
from millrace.environments.gym_rows import plain_row
from millrace.stages.groups import Episode


def reading(environment: AnyEnvironment, *, held_out: bool = False) -> tuple[Sequence[str], Check, Read]:
    """How rows of a domain are read: the fields they must have, their check, and how they are brought into its form."""

    def check(row: Mapping[str, Any]) -> str | None:
        return environment.validate(row) or form_problem(row)

    required = environment.required_fields
    if held_out and isinstance(environment, GroupEnvironment):
        required = environment.held_out_fields
    # An agent is given the row that was written for it.
    return required, check, as_written if isinstance(environment, AgentEnvironment) else plain_row


class Domain:
    """A domain's environment with its two data sets."""

    def __init__(self, name: str, config: DomainConfig, environment: AnyEnvironment, tokenizer: ChatTokenizer) -> None:
        """Raises DataError when the data sets cannot be read, or when the chat template cannot go on with a
        conversation of many turns."""
        self.name, self.environment = name, environment
        self._system, self._tokenizer, self._pass_rates = config.system_prompt, tokenizer, config.pass_rates
        self._thinking, self.turns = config.thinking, config.turns
        self.mask_unless_above = config.mask_unless_above

        self.train = PromptDataset(config.train, *reading(environment))
        self.held_out = PromptDataset(config.held_out, *reading(environment, held_out=True))
        if self.played and len(self.train):
            first = self.episode(self.train, 0, seed=0)
            tokenizer.require_observations(first.messages, tools=self.tools(first.row), thinking=first.thinking)

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
        """The functions that a row's prompt offers."""
        environment = self.environment
        return (
            environment.tools(row) if isinstance(environment, TurnEnvironment | AgentEnvironment) else row.get("tools")
        )

    @property
    def played(self) -> bool:
        """Whether its episodes have many turns."""
        return isinstance(self.environment, TurnEnvironment | AgentEnvironment)

    @property
    def compares(self) -> bool:
        """Whether rewards in training come from comparing the answers of a group."""
        return isinstance(self.environment, GroupEnvironment)

    def episode(self, dataset: PromptDataset, index: int, seed: int, *, scored: bool = True) -> Episode:
        row = dataset[index]
        messages = list(self.environment.reset(row))
        if self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        tools = self.tools(row)
        thinking = self._thinking if row.get("thinking") is None else row["thinking"]
        try:
            prompt = self._tokenizer.render_prompt(messages, tools=tools, thinking=thinking)
        except DataError as error:
            raise DataError(f"{dataset.where(index)}: {error}") from error
        return Episode(
            id=dataset.row_id(index),
            domain=self.name,
            row=row,
            messages=messages,
            prompt=tuple(prompt),
            seed=seed,
            scored=scored,
            thinking=thinking,
            turns=self.played,
            opening=self._tokenizer.answer_opening(prompt),
        )

    def training_rows(self, curriculum: CurriculumConfig) -> int | ChosenRows:
        """The training rows that a stage draws: how many there are, or those its curriculum chooses.

        Raises DataError for a row without a pass rate, and when none is left.
        """
        if curriculum == CurriculumConfig():
            return len(self.train)
        assert self._pass_rates is not None, "the recipe's rules ask for pass rates"
        path = Path(self._pass_rates)
        chosen = choose_rows(
            rates_of_rows(self.train, read_pass_rates(path), path),
            above=curriculum.above,
            below=curriculum.below,
            easy_to_hard=curriculum.order == "easy_to_hard",
        )
        if not len(chosen):
            bounds = ((chosen.too_hard, "above", curriculum.above), (chosen.too_easy, "below", curriculum.below))
            why = " and ".join(
                f"{count} are not {word} {bound:g}" for count, word, bound in bounds if bound is not None
            )
            raise DataError(
                f"domain {self.name}: the curriculum leaves none of {len(self.train)} training prompts, for by {path} "
                f"{why}; widen its bounds, or take other prompts"
            )
        return chosen

    def require_room(self, dataset: PromptDataset, context: int, answer: int) -> None:
        """Raises DataError, naming the row, for a prompt that leaves less than `answer` of `context` tokens."""
        for index in range(len(dataset)):
            length = len(self.episode(dataset, index, seed=0).prompt)
            if length + answer > context:
                raise DataError(
                    f"{dataset.where(index)}: the prompt has {length} tokens, so that an answer of "
                    f"max_response_tokens {answer} does not fit into fleet.max_model_len {context}; leave the row out, "
                    "raise fleet.max_model_len or lower max_response_tokens"
                )
