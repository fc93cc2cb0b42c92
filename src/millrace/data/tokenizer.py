"""The tokenizer of a Hugging Face checkpoint: messages in, token ids and loss masks out.

A conversation is cut into pieces of text where the policy takes over from the template and where it gives back, and
each piece is tokenised alone. So a trained turn has exactly the ids that a rollout of that turn has: the prompt's ids,
then the answer's, with no merge across the border.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from millrace.data.errors import DataError

Messages = Sequence[Mapping[str, Any]]
"""[{"role": ..., "content": ...}, ...]; an assistant message may carry "weight": 0 to be left out of the loss."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE_CONTENT = "probe7"


class ChatTokenizer:
    """Tokenizer and chat template of the checkpoint in `path`, checked against the model's vocabulary.

    Args:
        path: folder of a Hugging Face checkpoint.
        vocab_size: rows of the model's vocabulary; `vocab_size` of the folder's config.json when absent.

    Raises:
        DataError: the tokenizer is missing or unreadable, does not fit the model, or has no usable chat template.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        self.path = Path(path)
        self._tokenizer: Any = _load(self.path)  # transformers' annotations do not follow its keyword switches
        declared_stops = _declared_eos(self.path)
        self._check_ids(_declared_vocab_size(self.path) if vocab_size is None else vocab_size, declared_stops)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{self.path}: the tokenizer has no chat template: add chat_template.jinja or a chat_template in "
                "tokenizer_config.json"
            )
        self._marks_generation = bool(_GENERATION_BLOCK.search(str(self._tokenizer.chat_template)))
        self.end_of_turn_id, self._end_of_turn = self._find_end_of_turn()
        self.stop_token_ids: tuple[int, ...] = tuple(
            sorted({self.end_of_turn_id, self._tokenizer.eos_token_id, *declared_stops})
        )
        """Ids at which an answer ends: the template's end of turn, the tokenizer's and the checkpoint's eos."""

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids to text, by default without special tokens such as the end of turn."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special)

    def render_prompt(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the assistant answers (generation prompt included)."""
        return self.encode(self._render(_without_weights(messages), generation_prompt=True))

    def render_conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them are trained on.

        Trained on are the assistant's tokens, from behind the generation prompt to the end-of-turn token included, of
        every assistant message without `"weight": 0`. What follows the last end of turn is left out.

        Raises:
            DataError: no assistant message to train on, or the template rewrites earlier turns.
        """
        trained = [bool(m.get("weight", 1)) for m in messages if m.get("role") == "assistant"]
        if not any(trained):
            raise DataError("the conversation has no assistant message to train on")
        plain = _without_weights(messages)
        if self._marks_generation:
            tokens, mask = self._marked_by_template(plain, trained)
        else:
            tokens, mask = self._marked_by_prefixes(plain, trained)
        end = len(mask) - mask[::-1].index(True)
        return tokens[:end], mask[:end]

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

    def _render(self, messages: Messages, *, generation_prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template of {self.path} refuses the messages: {error}") from error

    def _marked_by_prefixes(self, messages: Messages, trained: Sequence[bool]) -> tuple[list[int], list[bool]]:
        """Cut the text at the assistant's turns, found by rendering one prefix of the messages after the other."""
        text = self._render(messages)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        cuts = [0]
        for turn, in_loss in zip(turns, trained, strict=True):
            if in_loss:
                cuts += self._turn_borders(messages, turn, text)
        tokens: list[int] = []
        mask: list[bool] = []
        for piece, (start, end) in enumerate(pairwise(cuts)):
            ids = self.encode(text[start:end])
            tokens += ids
            mask += [piece % 2 == 1] * len(ids)
        return tokens, mask

    def _turn_borders(self, messages: Messages, turn: int, text: str) -> tuple[int, int]:
        """Where in the whole text the assistant's message `turn` starts and where its end-of-turn token ends."""
        before = self._render(messages[:turn], generation_prompt=True)
        through = self._render(messages[: turn + 1])
        if not through.startswith(before) or not text.startswith(through):
            raise DataError(
                f"the chat template of {self.path} renders message {turn} and what precedes it differently once more "
                "messages follow (it drops or rewrites history), so that the turn cannot be trained on as it would be "
                'sampled: write one row per assistant message, with "weight": 0 on the earlier ones'
            )
        end = through.rfind(self._end_of_turn, len(before))
        if end < 0:
            raise DataError(f"the chat template of {self.path} does not end message {turn} with {self._end_of_turn}")
        return len(before), end + len(self._end_of_turn)

    def _marked_by_template(self, messages: Messages, trained: Sequence[bool]) -> tuple[list[int], list[bool]]:
        """Take the template's own {% generation %} marks, and add the end of turn where they leave it out.

        A template may mark some assistant messages only, such as those whose reasoning it keeps. Which ones is not
        told, so that single messages can be given weight 0 only where all are marked.
        """
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template of {self.path} refuses the messages: {error}") from error
        tokens = list(rendered["input_ids"])
        spans = _spans(rendered["assistant_masks"])
        if not spans or (len(spans) != len(trained) and not all(trained)):
            raise DataError(
                f"the chat template of {self.path} marks {len(spans)} generations in a conversation with "
                f"{len(trained)} assistant messages: check its {{% generation %}} blocks"
            )
        mask = [False] * len(tokens)
        for (start, end), in_loss in zip(spans, [True] * len(spans) if all(trained) else trained, strict=True):
            if end < len(tokens) and tokens[end] == self.end_of_turn_id and tokens[end - 1] != self.end_of_turn_id:
                end += 1
            mask[start:end] = [in_loss] * (end - start)
        return tokens, mask


def _load(path: Path) -> PreTrainedTokenizerBase:
    if not path.is_dir():
        raise DataError(
            f"{path}: there is no such folder; model.path must be a Hugging Face checkpoint on this machine"
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


def _without_weights(messages: Messages) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _probe(role: str) -> dict[str, str]:
    return {"role": role, "content": _PROBE_CONTENT}


def _spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each run of ones."""
    edges = [i for i, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
