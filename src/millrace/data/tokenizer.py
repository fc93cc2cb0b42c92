"""The tokenizer of a Hugging Face checkpoint: messages in, token ids and loss masks out.

What is trained on is what would be sampled. A trained turn is the prompt that an engine would be given for it,
tokenised as it is for the engine, and behind it the answer, tokenised for itself where the two would merge. A later
turn goes on in the same sequence if its own prompt begins with all of that, token for token; where the template
rewrites what has been (drops the reasoning of earlier turns, say), it begins a sequence of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from millrace.data.chat_template import chosen_template
from millrace.data.errors import DataError
from millrace.data.messages import THINK_CLOSE, THINK_OPEN, Messages, Tools, for_template, has_reasoning, is_trained

Encode = Callable[[str], list[int]]

_PROBE_CONTENT = "probe7"
_MARKERS = (THINK_OPEN, THINK_CLOSE, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Tokens that structure an answer. They belong to its text even where a tokenizer calls them special."""
_OPENED = re.compile(rf"{THINK_OPEN}\s*\Z")
_OPENING_TOKENS = 16
"""A prompt's last tokens, in which an opened block of reasoning stands: even a token a byte needs only eight."""


@dataclass(frozen=True)
class TrainingSequence:
    """Tokens of a conversation up to its last trained turn; both are of the same length."""

    tokens: list[int]
    loss_mask: list[bool]
    """True where a token is trained on."""


class ChatTokenizer:
    """Tokenizer and chat template of the checkpoint in `path`, checked against the model's vocabulary.

    Args:
        path: folder of a Hugging Face checkpoint.
        vocab_size: rows of the model's vocabulary; `vocab_size` of the folder's config.json when absent.
        chat_template: `model.chat_template` of the recipe; the checkpoint's own, or its family's, when absent.

    Raises:
        DataError: the tokenizer is missing or unreadable, does not fit the model, or has no usable chat template.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None, chat_template: str | None = None) -> None:
        self.path = Path(path)
        self._made_of = self.path, vocab_size, chat_template
        self._tokenizer: Any = _load(self.path)  # transformers' annotations do not follow its keyword switches
        declared_stops = _declared_eos(self.path)
        self._check_ids(_declared_vocab_size(self.path) if vocab_size is None else vocab_size, declared_stops)
        own, config = self._tokenizer.chat_template, _read_json(self.path / "config.json")
        self.chat_template = chosen_template(own, config, chat_template, self.path)
        """The Jinja text that is used."""
        self.brings_template = self.chat_template == own
        """Whether it is the checkpoint's own."""
        self._reads_reasoning = "reasoning_content" in self.chat_template
        self._where = f"the chat template of {self.path}" if chat_template is None else f"the template {chat_template}"
        self.end_of_turn_id, self._end_of_turn = self._find_end_of_turn()
        self._turns_are_apart = self._tokenises_turns_apart()
        self.stop_token_ids: tuple[int, ...] = tuple(
            sorted({self.end_of_turn_id, self._tokenizer.eos_token_id, *declared_stops})
        )
        """Ids at which an answer ends: the template's end of turn, the tokenizer's and the checkpoint's eos."""
        self._silent_ids = self._find_silent_ids()

    def __reduce__(self) -> tuple[type[ChatTokenizer], tuple[object, ...]]:
        """Another process reads it from its files again."""
        return ChatTokenizer, self._made_of

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, nothing added. Raises DataError for a text with half of a surrogate pair in it."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:  # all that tokenizers says of such a text
            raise DataError(
                "the text has half of a surrogate pair (such as \\ud800) in it, which is no character; leave it out"
            ) from error

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids to text, by default without special tokens such as the end of turn. `<think>`, `<tool_call>` and their
        like are text in any case: an answer is read by them."""
        kept = [token for token in tokens if token not in self._silent_ids] if skip_special else list(tokens)
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def render_prompt(
        self, messages: Messages, *, tools: Tools | None = None, thinking: bool | None = None
    ) -> list[int]:
        """Ids of a conversation up to where the assistant answers (generation prompt included).

        Args:
            tools: the functions that the assistant may call.
            thinking: take the template's thinking or non-thinking form; the one it takes by itself when absent.

        Raises:
            DataError: the template refuses the messages, or has only one form while `thinking` asks for one of two.
        """
        if thinking is not None and not self.has_thinking_forms:
            raise DataError(
                f"{self._where} has no thinking and non-thinking form (it reads no enable_thinking), so that "
                f"thinking: {str(thinking).lower()} would change nothing; leave it out, or name another template with "
                "model.chat_template"
            )
        prepared = for_template(messages, reads_reasoning=self._reads_reasoning)
        return self.encode(self._render(prepared, tools, thinking, generation_prompt=True))

    def answer_opening(self, prompt: Sequence[int]) -> str:
        """What of an answer stands in its prompt already: the `<think>` and newline of a thinking form, or nothing."""
        opened = _OPENED.search(self.decode(prompt[-_OPENING_TOKENS:], skip_special=False))
        return opened.group() if opened else ""

    def render_observation(self, observation: Messages, *, thinking: bool | None = None) -> list[int]:
        """Ids that stand between the end-of-turn token of an assistant's turn and where its next turn begins, with
        `observation` between the two.

        They are rendered as a difference, behind an assistant's message that is a mere mark: what a policy wrote is
        never rendered, and so neither tokenised again nor rewritten. A template that drops the reasoning of earlier
        turns once the user speaks drops none here. What opened the conversation is left out, which is much of the time
        where there are many tools; `require_observations` tells whether a template minds.

        Raises:
            DataError: the template refuses the messages, or does not render them behind the assistant's.
        """
        ids = self.encode(self._end_of_turn + self._between([_probe("user")], observation, None, thinking))
        return ids[ids.index(self.end_of_turn_id) + 1 :]

    def require_observations(self, opening: Messages, *, tools: Tools | None, thinking: bool | None) -> None:
        """Raises DataError when a conversation that was opened so cannot go on through `render_observation`."""
        observation = [{"role": "tool", "content": _PROBE_CONTENT}]
        plain = self._between([_probe("user")], observation, None, thinking)
        if self._between(opening, observation, tools, thinking) != plain:
            raise DataError(
                f"{self._where} renders a tool's result otherwise when the conversation has tools or a system message, "
                "which episodes of many turns do not know; name another one with model.chat_template"
            )

    def _between(self, opening: Messages, observation: Messages, tools: Tools | None, thinking: bool | None) -> str:
        """The text from behind the end of an assistant's turn to the beginning of its next one."""
        mark = _PROBE_CONTENT
        while any(mark in str(message) for message in observation):
            mark += "x"
        messages = [*opening, {"role": "assistant", "content": mark}, *observation]
        prepared = for_template(messages, reads_reasoning=self._reads_reasoning)
        _, found, behind = self._render(prepared, tools, thinking, generation_prompt=True).rpartition(mark)
        inside, ended, between = behind.partition(self._end_of_turn)
        if not found or not ended or inside.strip():
            raise DataError(
                f"{self._where} does not keep an assistant's turn, ended by {self._end_of_turn}, before what follows "
                "it, so that episodes of many turns cannot go on behind it; name another one with model.chat_template"
            )
        return between

    def render_conversation(
        self, messages: Messages, *, tools: Tools | None = None, thinking: bool | None = None
    ) -> list[TrainingSequence]:
        """The training sequences of a conversation; each trained turn is trained on in exactly one of them.

        Trained on are the assistant's tokens, tool calls included, from behind the generation prompt to the
        end-of-turn token included, of every assistant message without `"train": false`.

        Args:
            tools: the functions that the assistant may call.
            thinking: True takes the thinking form for every turn, False leaves all reasoning out and takes the
                non-thinking form. None takes the form by the turn: thinking if the message has reasoning.

        Raises:
            DataError: no assistant message to train on, or one that the template does not render behind its prompt.
        """
        turns = [n for n, message in enumerate(messages) if message.get("role") == "assistant" and is_trained(message)]
        if not turns:
            raise DataError("the conversation has no assistant message to train on")
        prepared = for_template(messages, reads_reasoning=self._reads_reasoning, without_reasoning=thinking is False)
        encode = self._encode_by_turns()
        sequences: list[TrainingSequence] = []
        for turn in turns:
            form = has_reasoning(prepared[turn]) if thinking is None else thinking
            prompt_text, answer_text = self._turn(prepared, turn, tools, form)
            prompt, answer = _encode_turn(encode, prompt_text, answer_text)
            goes_on = bool(sequences) and prompt[: len(sequences[-1].tokens)] == sequences[-1].tokens
            mask = sequences.pop().loss_mask if goes_on else []
            mask = mask + [False] * (len(prompt) - len(mask)) + [True] * len(answer)
            sequences.append(TrainingSequence(prompt + answer, mask))
        return sequences

    def _check_ids(self, vocab_size: int, declared_stops: Sequence[int]) -> None:
        ids = self._tokenizer.get_vocab().values()
        if max(ids) >= vocab_size:
            raise DataError(
                f"{self.path}: the tokenizer has ids up to {max(ids)}, but the model's vocabulary has {vocab_size} "
                "rows: tokenizer and model are not of one checkpoint"
            )
        if self._tokenizer.eos_token_id is None:
            raise DataError(f"{self.path}: the tokenizer has no eos token: set eos_token in tokenizer_config.json")
        known = set(ids)
        for stop in declared_stops:
            if stop not in known:
                raise DataError(
                    f"{self.path}: the checkpoint's eos_token_id {stop} is unknown to its tokenizer: "
                    "tokenizer and model are not of one checkpoint"
                )

    def _find_end_of_turn(self) -> tuple[int, str]:
        """The special token that the template puts behind an assistant's message."""
        text = self._render([_probe("user"), _probe("assistant")])
        added = self._tokenizer.added_tokens_decoder
        tail = text[text.rindex(_PROBE_CONTENT) + len(_PROBE_CONTENT) :]
        for token in self.encode(tail):
            if token in added:
                return token, added[token].content
        raise DataError(
            f"{self.path}: the chat template ends an assistant's message with no special token, so an answer could "
            "never be seen to end: put one (such as the eos token) behind it"
        )

    def _find_silent_ids(self) -> frozenset[int]:
        """Special tokens that are no part of a text."""
        added = self._tokenizer.added_tokens_decoder
        special = {*self._tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        return frozenset(number for number in special if number not in added or added[number].content not in _MARKERS)

    @cached_property
    def has_thinking_forms(self) -> bool:
        """Whether the template has a thinking and a non-thinking form."""
        forms = {self._render([_probe("user")], None, form, generation_prompt=True) for form in (True, False)}
        return len(forms) == 2

    def _render(
        self,
        messages: Messages,
        tools: Tools | None = None,
        thinking: bool | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        # Templates of DeepSeek call it thinking, all others enable_thinking; a template ignores what it does not read.
        form = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **form,
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: a template takes a null for text
            raise DataError(f"{self._where} refuses the messages: {error}") from error

    def _turn(self, messages: Messages, turn: int, tools: Tools | None, thinking: bool) -> tuple[str, str]:
        """The prompt of the assistant's message `turn`, and its answer with the end-of-turn token."""
        prompt = self._render(messages[:turn], tools, thinking, generation_prompt=True)
        through = self._render(messages[: turn + 1], tools, thinking)
        if not through.startswith(prompt):
            raise DataError(self._unlike_its_prompt(prompt, through, messages, turn, thinking))
        end = through.rfind(self._end_of_turn, len(prompt))
        if end < 0:
            raise DataError(f"{self._where} does not end message {turn} with {self._end_of_turn}")
        return prompt, through[len(prompt) : end + len(self._end_of_turn)]

    def _unlike_its_prompt(self, prompt: str, through: str, messages: Messages, turn: int, thinking: bool) -> str:
        differs = next(n for n, (a, b) in enumerate(zip(prompt + "\0", through + "\0", strict=False)) if a != b)
        start = max(0, differs - 20)
        way_out = (
            "the message has no reasoning, so leave thinking out, or give it a reasoning_content"
            if thinking and not has_reasoning(messages[turn])
            else 'put "train": false on it, or name a template that keeps it with model.chat_template'
        )
        return (
            f"{self._where} renders message {turn} otherwise than its prompt begins "
            f"({through[start : differs + 20]!r} where the prompt has {prompt[start : differs + 20]!r}), so that it "
            f"cannot be trained on as it would be sampled; {way_out}"
        )

    def _tokenises_turns_apart(self) -> bool:
        """Whether text behind an end of turn has the same ids whether or not it is tokenised with what precedes it."""
        ends = [before + self._end_of_turn for before in ("a", "a ", "a\n")]
        return all(
            self.encode(end + after) == self.encode(end) + self.encode(after)
            for end in ends
            for after in ("a", " a", "\n", "\n\na", "\n a", self._end_of_turn)
        )

    def _encode_by_turns(self) -> Encode:
        """`encode` for the texts of one conversation, which share most of their turns: each turn is tokenised once."""
        known: dict[str, list[int]] = {}

        def encode(text: str) -> list[int]:
            *ended, rest = text.split(self._end_of_turn)
            ids: list[int] = []
            for piece in (*(piece + self._end_of_turn for piece in ended), rest):
                if piece not in known:
                    known[piece] = self.encode(piece)
                ids += known[piece]
            return ids

        return encode if self._turns_are_apart else self.encode


def _encode_turn(encode: Encode, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt, as an engine is given them, and of the answer behind it.

    The answer's are those it has behind the prompt, or those it has alone where it would merge with the prompt.
    """
    given, whole = encode(prompt), encode(prompt + answer)
    if whole[: len(given)] == given:
        return given, whole[len(given) :]
    return given, encode(answer)


def _load(path: Path) -> PreTrainedTokenizerBase:
    if not path.is_dir():
        raise DataError(
            f"{path}: there is no such folder; name the folder of a Hugging Face checkpoint on this machine"
        )
    if not (path / "tokenizer_config.json").is_file() and not (path / "tokenizer.json").is_file():
        raise DataError(f"{path}: the checkpoint has no tokenizer (tokenizer.json, tokenizer_config.json)")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _read_json(path / name)  # the tokenizers library answers a truncated file with a bare Exception
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: the tokenizer cannot be loaded: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); the file may be truncated, fetch it again") from error


def _declared_vocab_size(path: Path) -> int:
    try:
        return int(_read_json(path / "config.json")["vocab_size"])
    except KeyError as error:
        raise DataError(f"{path / 'config.json'}: vocab_size is missing, so the tokenizer cannot be checked") from error


def _declared_eos(path: Path) -> list[int]:
    """The eos ids that config.json and generation_config.json name."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        declared = _read_json(path / name).get("eos_token_id")
        if isinstance(declared, int):
            found.add(declared)
        elif isinstance(declared, list):
            found.update(declared)
    return sorted(found)


def _probe(role: str) -> dict[str, str]:
    return {"role": role, "content": _PROBE_CONTENT}
