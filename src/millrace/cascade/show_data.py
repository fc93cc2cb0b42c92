"""`millrace data show`: the data of a recipe as its run would read them. Nothing is started, and no GPU is needed.

Rows pass through the environments' own checks, and prompts are rendered by the recipe's tokenizer and chat template.
"""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from millrace.config.errors import ConfigError
from millrace.config.graph import nearest
from millrace.config.model_shape import ModelShape
from millrace.config.rules import check_recipe
from millrace.config.schema import Recipe, SamplingStage, SftStage
from millrace.data.datasets import JsonlFile, PromptDataset, conversation_problem, wrong_rows
from millrace.data.errors import DataError
from millrace.data.rendering import training_sequences
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import AnyEnvironment
from millrace.environments.gym_rows import REQUEST
from millrace.environments.judge import HttpEndpoint, Judge
from millrace.environments.registry import make_environment
from millrace.errors import MillraceError
from millrace.stages.domains import Domain, reading

LISTED = 5
"""Problems of a file that are told, the first ones."""
WIDTH, LINES, LAST_LINES = 112, 24, 8
"""Columns and lines of an example, and how many of the lines are its last ones when it is cut."""

KEPT: Mapping[str, Sequence[str]] = {
    "math": ("answer", "expected_answer"),
    "python_tool": ("answer", "expected_answer"),
    "instruction_following": ("instruction_id_list", "kwargs"),
    "mcqa": ("answer", "expected_answer", "template_metadata"),
    "structured_outputs": ("schema_str",),
    "genrm": ("reference",),
    "code": ("tests", "input_output", "public_test_cases", "private_test_cases", "unit_tests", "solutions"),
    "workplace_assistant": ("ground_truth",),
    "long_context": ("answer", "expected_answer", "needed_documents"),
    "swe_agentless": ("golden_patch",),
    "swe_agentic": (
        *("patch", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS"),
        *("execution_result_content", "expected_output_json"),
    ),
}
"""Fields of a row that an environment scores by and that it puts into no prompt."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class _View:
    """What all parts need."""

    recipe: Recipe
    tokenizer: ChatTokenizer
    broken_rules: Sequence[str]
    rows: int | None
    say: Say

    def tell(self, problems: Sequence[str]) -> bool:
        """Say the first few problems; whether there are none."""
        for problem in problems[:LISTED]:
            self.say(f"    {problem}")
        if len(problems) > LISTED:
            self.say(f"    and {len(problems) - LISTED} more")
        return not problems

    def looked_at(self, rows: int) -> range:
        return range(rows if self.rows is None else min(rows, self.rows))


def show_data(recipe: Recipe, say: Say, *, domain: str | None = None, rows: int | None = None) -> bool:
    """Tell of each domain and of the conversations of each SFT stage, or of one domain; whether all is right.

    Args:
        rows: render only so many rows of each file; all are checked.

    Raises:
        ConfigError: the recipe has no such domain, or no model.
        DataError: its tokenizer cannot be used.
    """
    if domain is not None and domain not in recipe.domains:
        raise ConfigError(f"domains.{domain} is not in the recipe{nearest(domain, recipe.domains)}")
    vocabulary = ModelShape.from_hf(recipe.model.path).vocab_size
    tokenizer = ChatTokenizer(recipe.model.path, vocabulary, recipe.model.chat_template)
    view = _View(recipe, tokenizer, check_recipe(recipe), rows, say)
    right = [_show_domain(view, name) for name in recipe.domains if domain in (None, name)]
    if domain is None:
        right += [_show_conversations(view, stage) for stage in recipe.stages if isinstance(stage, SftStage)]
    return all(right)


def _show_domain(view: _View, name: str) -> bool:
    config = view.recipe.domains[name]
    view.say(f"domain {name}: environment {config.environment}")
    if not view.tell([rule for rule in view.broken_rules if rule.startswith((f"domains.{name}.", f"domains.{name}:"))]):
        return False
    try:
        with _environment(view.recipe, name) as environment:
            right = True
            for key, path in (("train", config.train), ("held_out", config.held_out)):
                form = reading(environment, held_out=key == "held_out")
                right &= _show_rows(view, key, path, *wrong_rows(path, *form))
            return right and _show_prompts(view, Domain(name, config, environment, view.tokenizer))
    except MillraceError as error:  # no sandbox on this machine, an id that comes twice, a template that refuses turns
        return view.tell([str(error)])


@contextmanager
def _environment(recipe: Recipe, name: str) -> Iterator[AnyEnvironment]:
    # An endpoint is opened by the first question, and nothing is asked here.
    judges = {key: Judge(key, config, HttpEndpoint(config.url or "", None)) for key, config in recipe.judges.items()}
    environment = make_environment(recipe.domains[name], judges)
    try:
        yield environment
    finally:
        asyncio.run(environment.close())


def _show_rows(view: _View, key: str, path: str, rows: int, problems: Sequence[str]) -> bool:
    view.say(f"  {key}: {path}, {rows} rows" + (f", {len(problems)} of them wrong:" if problems else ""))
    return view.tell(problems)


def _show_prompts(view: _View, domain: Domain) -> bool:
    stages = [s for s in view.recipe.stages if isinstance(s, SamplingStage) and domain.name in s.domains]
    answers = [stage.sampling.max_response_tokens for stage in stages]
    measured = view.recipe.evaluation.sampling.max_response_tokens
    right = [
        _show_lengths(view, domain, "train", domain.train, max(answers, default=0)),
        _show_lengths(view, domain, "held_out", domain.held_out, measured),
    ]
    rows = [domain.train[index] for index in view.looked_at(len(domain.train))]
    view.say(_tools_line(domain.tools(row) for row in rows))
    if all(right):
        episode, row = domain.episode(domain.train, 0, seed=0), domain.train[0]
        kept = ", ".join(_kept(view.recipe.domains[domain.name].environment, row)) or "nothing"
        view.say(f"  the prompt of {domain.train.where(0)}; kept from the policy: {kept}")
        _show_text(view, episode.prompt)
    return all(right)


def _show_lengths(view: _View, domain: Domain, key: str, dataset: PromptDataset, answer: int) -> bool:
    """Lengths of prompts, of which each has to leave room for an answer."""
    room = view.recipe.fleet.max_model_len - answer
    lengths, problems = [], []
    for index in view.looked_at(len(dataset)):
        try:
            lengths.append(len(domain.episode(dataset, index, seed=0).prompt))
        except DataError as error:
            problems.append(str(error))
            continue
        if lengths[-1] > room:
            problems.append(
                f"{dataset.where(index)}: the prompt has {lengths[-1]} tokens, and an answer of {answer} leaves it "
                f"{room} of fleet.max_model_len {view.recipe.fleet.max_model_len}"
            )
    view.say(f"  {key}: {_spread(lengths, 'prompts', len(dataset))}")
    return view.tell(problems)


def _show_conversations(view: _View, stage: SftStage) -> bool:
    view.say(f"stage {stage.name}: conversations")
    if not view.tell([rule for rule in view.broken_rules if rule.startswith(f"stages.{stage.name}.data")]):
        return False
    right = True
    for path in stage.data:
        rows, problems = wrong_rows(path, ["messages"], conversation_problem)
        right &= _show_rows(view, "data", path, rows, problems) and _show_sequences(view, stage, path)
    return right


def _show_sequences(view: _View, stage: SftStage, path: str) -> bool:
    try:
        file = JsonlFile(path, ["messages"], conversation_problem)
    except DataError as error:  # it is empty
        return view.tell([str(error)])
    lengths, trained, problems, first = [], 0, [], None
    for index in view.looked_at(len(file)):
        try:
            sequences = training_sequences(file, index, view.tokenizer, stage.thinking)
        except DataError as error:
            problems.append(str(error))
            continue
        first = first or (index, sequences[0])
        lengths += [len(sequence.tokens) for sequence in sequences]
        trained += sum(sum(sequence.loss_mask) for sequence in sequences)
        longest = max(len(sequence.tokens) for sequence in sequences)
        if longest > stage.max_length and not stage.drop_overlong:
            problems.append(f"{file.where(index)}: {longest} tokens, more than max_length {stage.max_length}")
    view.say(f"  {_spread(lengths, 'training sequences', len(file))}; {trained} of all tokens are trained on")
    if dropped := sum(length > stage.max_length for length in lengths) if stage.drop_overlong else 0:
        view.say(f"  {dropped} are longer than max_length {stage.max_length} and dropped")
    view.say(_tools_line(file[index].get("tools") for index in view.looked_at(len(file))))
    if first:
        index, sequence = first
        view.say(f"  {file.where(index)}, {sum(sequence.loss_mask)} of {len(sequence.tokens)} tokens trained on")
        _show_text(view, sequence.tokens)
    return view.tell(problems)


def _spread(lengths: Sequence[int], what: str, rows: int) -> str:
    if not lengths:
        return f"none of {rows} rows could be rendered"
    return (
        f"{len(lengths)} {what} of {min(lengths)} to {max(lengths)} tokens, median {median(lengths):g}, "
        f"{sum(lengths)} in all"
    )


def _tools_line(offered: Iterable[Sequence[Mapping[str, Any]] | None]) -> str:
    names = dict.fromkeys(tool.get("function", tool)["name"] for tools in offered for tool in tools or ())
    return f"  tools offered: {', '.join(names) or 'none'}"


def _kept(environment: str, row: Mapping[str, Any]) -> list[str]:
    if environment == "agent":  # its server is given all, and asks the policy what it likes
        return [name for name in row if name != REQUEST]
    return [name for name in KEPT[environment] if name in row]


def _show_text(view: _View, tokens: Sequence[int]) -> None:
    """The tokens as text, special ones included; the middle is left out where it is longer than a screen."""
    text = view.tokenizer.decode(tokens, skip_special=False)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH, drop_whitespace=False) or [""]]
    if len(lines) > LINES:
        left_out = len(lines) - LINES
        lines = [*lines[: LINES - LAST_LINES], f"[... {left_out} lines left out ...]", *lines[-LAST_LINES:]]
    for line in lines:
        view.say(f"    | {line}")
