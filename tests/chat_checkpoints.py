"""Folders with a tokenizer and a chat template, and templates of the kinds that checkpoints bring."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_checkpoints import CHAT_TEMPLATE, IM_END, write_tokenizer

from millrace.data.tokenizer import ChatTokenizer, TrainingSequence

CHATML = CHAT_TEMPLATE
END = -1
THINKING_ONCE = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '\\n' }}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's: reasoning of the present turn alone, an empty block before the last answer that has none."""


def checkpoint(
    path: Path,
    template: str | None = None,
    *,
    merges: list[str] | None = None,
    special: tuple[str, ...] = (),
    **config: object,
) -> Path:
    """A folder with the byte tokenizer, its chat template replaced, and BPE merges and special tokens added.

    Merges take the ids from 256 on, and the special tokens those behind them.
    """
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"eos_token_id": IM_END + len(merges or ()), **config}))
    if template is not None:
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    if merges:
        tokenizer["model"]["merges"] = merges
        tokenizer["model"]["vocab"].update({m.replace(" ", ""): 256 + i for i, m in enumerate(merges)})
    for number, text in enumerate(special, 300):
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokenizer["added_tokens"].append({"id": number, "content": text, **added})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def shown(tokenizer: ChatTokenizer, sequence: TrainingSequence) -> str:
    """The text of a sequence with what is trained on in double brackets."""
    pieces, current, inside = [], [], False
    for token, trained in zip([*sequence.tokens, END], [*sequence.loss_mask, False], strict=True):
        if trained != inside:
            pieces.append(tokenizer.decode(current, skip_special=False) + ("]]" if inside else "[["))
            current, inside = [], trained
        current.append(token)
    assert current == [END], "nothing stands behind the last trained token"
    return "".join(pieces)
