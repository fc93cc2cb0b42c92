"""Models of a quarter of a million parameters that have learnt one answer by heart, such as a judge's verdict."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_checkpoints import VOCABULARY, write_checkpoint
from transformers import AutoModelForCausalLM

from millrace.data.tokenizer import ChatTokenizer

VERDICT = '{"score_1":4,"score_2":2,"ranking":2}'
STEPS, BATCH = 160, 4

Messages = list[dict[str, str]]


def write_judge(path: Path) -> Path:
    """A checkpoint that answers every comparison in the roles form with VERDICT."""
    return write_by_heart(path, VERDICT, _comparisons, STEPS)


def write_by_heart(path: Path, text: str, batch: Callable[[random.Random], list[Messages]], steps: int) -> Path:
    """A checkpoint that answers prompts such as those of a `batch` (all of one length) with `text` and ends there."""
    write_checkpoint("qwen3", path, num_hidden_layers=2)
    tokenizer = ChatTokenizer(path, VOCABULARY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(0)
    answer = [*tokenizer.encode(text), tokenizer.end_of_turn_id]
    for _ in range(steps):
        prompts = [tokenizer.render_prompt(messages) for messages in batch(draw)]
        tokens = torch.tensor([[*prompt, *answer] for prompt in prompts])
        logits = model(tokens).logits[:, -len(answer) - 1 : -1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -len(answer) :].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


def _comparisons(draw: random.Random) -> list[Messages]:
    characters = draw.randint(10, 240)
    return [_comparison(draw, characters) for _ in range(BATCH)]


def _comparison(draw: random.Random, characters: int) -> Messages:
    """Random texts of so many characters in all: the tokenizer has one token a byte, so a batch needs no padding."""
    few = draw.choices(string.printable, k=draw.randint(1, 60))
    text = "".join(draw.choices(few, k=characters))
    first, second = sorted(draw.sample(range(1, characters), 2))
    parts = (text[:first], text[first:second], text[second:])
    return [
        {"role": role, "content": part} for role, part in zip(("user", "response_1", "response_2"), parts, strict=True)
    ]
