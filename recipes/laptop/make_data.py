"""Write what the laptop recipes start from: a small random base model with its own tokenizer, and synthetic data.

    python recipes/laptop/make_data.py --out demo --seed 1

Two tasks, both scored by Millrace's own environments:

* math: sums of three digits, one step at a time between <think> and </think>, then the result in \\boxed{}.
* instruction following: short lists of words under two or three verifiable constraints.

The demonstrations are noisy on purpose, as scraped ones are: about half of them slip in a step, forget the box or
ignore a constraint. So the supervised policy knows the tasks and passes about half of the held-out prompts, and
reinforcement learning has something to sharpen. Training and held-out prompts are disjoint.

The base follows the Qwen3 layout (`base/`), and with --moe also the mixture-of-experts one (`base-moe/`). The same seed
writes the same files.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

logger = logging.getLogger("make_data")

Row = dict[str, Any]

SFT_CONVERSATIONS = {"math": 7000, "instruction_following": 7000}
TRAIN_PROMPTS = 1200
HELD_OUT_PROMPTS = 128

VOCABULARY = 640
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# --------------------------------------------------------------------------------------------------------------- math

MATH_SLIP, MATH_UNBOXED, MATH_EARLY = 0.06, 0.2, 0.2
"""Shares of demonstrations with a wrong step, without a box, and with the first step's result in the box."""


@dataclass(frozen=True)
class Sum:
    """a (+|-) b (+|-) c with digits a, b, c from 1 to 8; no step goes below zero."""

    terms: tuple[int, int, int]
    signs: tuple[int, int]

    @property
    def text(self) -> str:
        (a, b, c), (first, second) = self.terms, self.operators
        return f"{a}{first}{b}{second}{c}"

    @property
    def operators(self) -> tuple[str, str]:
        first, second = ("+" if sign > 0 else "-" for sign in self.signs)
        return first, second

    @property
    def partial(self) -> int:
        return self.terms[0] + self.signs[0] * self.terms[1]

    @property
    def result(self) -> int:
        return self.partial + self.signs[1] * self.terms[2]

    def row(self) -> Row:
        return {"prompt": f"What is {self.text}?", "answer": str(self.result)}

    def demonstrate(self, rng: random.Random) -> str:
        """A worked answer, right or with one of the three flaws."""
        flaw = rng.random()
        slipped_step = rng.randrange(2) if flaw < MATH_SLIP else None
        partial = self.partial + (_slip(rng) if slipped_step == 0 else 0)
        result = partial + self.signs[1] * self.terms[2] + (_slip(rng) if slipped_step == 1 else 0)
        (a, b, c), (first, second) = self.terms, self.operators
        steps = f"<think>{a}{first}{b}={partial},{partial}{second}{c}={result}</think>"
        if MATH_SLIP <= flaw < MATH_SLIP + MATH_UNBOXED:
            return f"{steps}The answer is {result}."
        if MATH_SLIP + MATH_UNBOXED <= flaw < MATH_SLIP + MATH_UNBOXED + MATH_EARLY:
            result = partial
        return f"{steps}\\boxed{{{result}}}"


def _slip(rng: random.Random) -> int:
    return rng.choice((-2, -1, 1, 2))


def all_sums() -> list[Sum]:
    digits, signs = range(1, 9), (1, -1)
    sums = (Sum((a, b, c), (s, t)) for a in digits for b in digits for c in digits for s in signs for t in signs)
    return [one for one in sums if one.partial >= 0 and one.result >= 0]


# ---------------------------------------------------------------------------------------------- instruction following

OBEY = 0.8
"""Chance that a demonstration follows one of its constraints on purpose."""

TOPICS = {
    "animals": ("cat", "dog", "horse", "mouse", "sheep", "tiger"),
    "fruits": ("apple", "pear", "plum", "cherry", "melon", "grape"),
    "colours": ("red", "blue", "green", "black", "white", "brown"),
    "tools": ("hammer", "saw", "drill", "ladder", "brush", "spade"),
}
CLOSINGS = ("done", "goodbye", "thanks")


@dataclass(frozen=True)
class Style:
    """How a list of words is written."""

    items: int
    case: str = "sentence"
    separator: str = ", "
    bullets: bool = False
    quoted: bool = False
    include: str | None = None
    closing: str | None = None

    def write(self, topic: str, rng: random.Random) -> str:
        words = rng.sample([word for word in TOPICS[topic] if word != self.include], k=self.items)
        if self.include is not None:
            words[rng.randrange(len(words))] = self.include
        if self.closing is not None:
            words[-1:] = [self.closing] if len(words) > 1 and self.include != words[-1] else [words[-1], self.closing]
        if self.bullets:
            text = "\n".join(f"- {word.capitalize()}" for word in words)
        else:
            text = self.separator.join(words).capitalize()
        text = {"sentence": text, "lower": text.lower(), "upper": text.upper()}[self.case]
        return f'"{text}"' if self.quoted else text


@dataclass(frozen=True)
class Wish:
    """One constraint: its sentence in the prompt, its checkable form, and how a demonstration follows or misses it."""

    group: str
    """Two wishes of one group never meet in a prompt."""
    sentence: str
    instruction_id: str
    kwargs: Row
    follow: Callable[[Style], Style]
    miss: Callable[[Style], Style]


def _case_wish(rng: random.Random, topic: str) -> Wish:
    case = rng.choice(("lower", "upper"))
    name, instruction = {
        "lower": ("lowercase", "change_case:english_lowercase"),
        "upper": ("capital", "change_case:english_capital"),
    }[case]
    return Wish("case", f"Use {name} letters.", instruction, {}, lambda s: replace(s, case=case), lambda s: s)


def _comma_wish(rng: random.Random, topic: str) -> Wish:
    return Wish(
        "comma", "Use no commas.", "punctuation:no_comma", {}, lambda s: replace(s, separator=" and "), lambda s: s
    )


def _length_wish(rng: random.Random, topic: str) -> Wish:
    relation = rng.choice(("at least", "less than"))
    number = rng.choice((4, 5))
    enough, wrong = (number, number - 2) if relation == "at least" else (2, number)
    return Wish(
        "layout",
        f"Write {relation} {number} words.",
        "length_constraints:number_words",
        {"relation": relation, "num_words": number},
        lambda s: replace(s, items=enough),
        lambda s: replace(s, items=wrong),
    )


def _bullet_wish(rng: random.Random, topic: str) -> Wish:
    number = rng.choice((2, 3, 4))
    return Wish(
        "layout",
        f"Write {number} bullets.",
        "detectable_format:number_bullet_lists",
        {"num_bullets": number},
        lambda s: replace(s, items=number, bullets=True),
        lambda s: replace(s, items=number),
    )


def _keyword_wish(rng: random.Random, topic: str) -> Wish:
    word = rng.choice(TOPICS[topic])
    return Wish(
        "keyword",
        f"Include {word}.",
        "keywords:existence",
        {"keywords": [word]},
        lambda s: replace(s, include=word),
        lambda s: s,
    )


def _closing_wish(rng: random.Random, topic: str) -> Wish:
    word = rng.choice(CLOSINGS)
    return Wish(
        "closing",
        f"End with {word}.",
        "startend:end_checker",
        {"end_phrase": word},
        lambda s: replace(s, closing=word),
        lambda s: s,
    )


def _quotation_wish(rng: random.Random, topic: str) -> Wish:
    return Wish("layout", "Use quotes.", "startend:quotation", {}, lambda s: replace(s, quoted=True), lambda s: s)


WISHES = (_case_wish, _comma_wish, _length_wish, _bullet_wish, _keyword_wish, _closing_wish, _quotation_wish)


@dataclass(frozen=True)
class ListTask:
    topic: str
    wishes: tuple[Wish, ...]

    def row(self) -> Row:
        return {
            "prompt": " ".join([f"Name some {self.topic}.", *(wish.sentence for wish in self.wishes)]),
            "instruction_id_list": [wish.instruction_id for wish in self.wishes],
            "kwargs": [wish.kwargs for wish in self.wishes],
        }

    def demonstrate(self, rng: random.Random) -> str:
        """An answer that follows each constraint with chance OBEY."""
        style = Style(items=rng.choice((2, 3, 4)))
        for wish in self.wishes:
            style = wish.follow(style) if rng.random() < OBEY else wish.miss(style)
        return style.write(self.topic, rng)


def draw_list_task(rng: random.Random) -> ListTask:
    topic = rng.choice(tuple(TOPICS))
    wishes: dict[str, Wish] = {}
    wanted = rng.choice((2, 2, 2, 3))
    while len(wishes) < wanted:
        wish = rng.choice(WISHES)(rng, topic)
        wishes.setdefault(wish.group, wish)
    return ListTask(topic, tuple(wishes.values()))


def distinct_list_tasks(rng: random.Random, count: int) -> list[ListTask]:
    """Tasks with pairwise different sets of constraints, whatever their order."""
    tasks: dict[frozenset[str], ListTask] = {}
    while len(tasks) < count:
        task = draw_list_task(rng)
        tasks.setdefault(frozenset([task.topic, *(wish.sentence for wish in task.wishes)]), task)
    return list(tasks.values())


# ------------------------------------------------------------------------------------------------------------ writing

Task = Sum | ListTask


def demonstrations(tasks: Sequence[Task], rng: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        task = rng.choice(tasks)
        question = {"role": "user", "content": task.row()["prompt"]}
        yield {"messages": [question, {"role": "assistant", "content": task.demonstrate(rng)}]}


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    aside = path.with_suffix(".tmp")
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    aside.replace(path)
    logger.info("%s: %d rows", path, len(lines))


def write_domain(folder: Path, tasks: Sequence[Task]) -> Sequence[Task]:
    """Write a domain's prompts; returns the tasks that are not held out."""
    held_out, train = tasks[:HELD_OUT_PROMPTS], tasks[HELD_OUT_PROMPTS : HELD_OUT_PROMPTS + TRAIN_PROMPTS]
    for split, members in (("train", train), ("held_out", held_out)):
        rows = ({"id": f"{split}-{i}", **task.row()} for i, task in enumerate(members))
        write_jsonl(folder / f"{split}.jsonl", rows)
    return train


def write_data(folder: Path, seed: int) -> list[str]:
    """Write the data of both domains; returns the texts that the tokenizer is trained on."""
    rng = random.Random(seed)
    sums = all_sums()
    rng.shuffle(sums)
    math_tasks = write_domain(folder / "math", sums)
    drawn = distinct_list_tasks(rng, HELD_OUT_PROMPTS + TRAIN_PROMPTS)
    list_tasks = write_domain(folder / "instruction_following", drawn)
    conversations = [
        *demonstrations(math_tasks, rng, SFT_CONVERSATIONS["math"]),
        *demonstrations(list_tasks, rng, SFT_CONVERSATIONS["instruction_following"]),
    ]
    rng.shuffle(conversations)
    write_jsonl(folder / "sft.jsonl", conversations)
    return [message["content"] for row in conversations for message in row["messages"]]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML; <think> and </think> are tokens that stay in the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    thinking = ["<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(thinking),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # a number is one token even where it is rare, and the roles are part of the template, not of the texts
    numbers = [str(result) for result in range(28)]
    tokenizer.train_from_iterator([*texts, *(["user\n", "assistant\n", "system\n", *numbers] * 100)], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in thinking])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def base_config(tokenizer: PreTrainedTokenizerFast, moe: bool) -> Qwen3Config | Qwen3MoeConfig:
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.04,
    }
    if moe:
        return Qwen3MoeConfig(
            **shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=192, norm_topk_prob=True
        )
    return Qwen3Config(**shape)


def write_base(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, moe: bool) -> None:
    torch.manual_seed(seed)
    config = base_config(tokenizer, moe)
    model = Qwen3MoeForCausalLM(config) if moe else Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("%s: %s with %d parameters", folder, config.model_type, model.num_parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the base model and the data of the laptop recipes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of the data and of the base's weights")
    parser.add_argument("--moe", action="store_true", help="also write the mixture-of-experts base")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    texts = write_data(options.out, options.seed)
    tokenizer = train_tokenizer(texts)
    write_base(options.out / "base", tokenizer, options.seed, moe=False)
    if options.moe:
        write_base(options.out / "base-moe", tokenizer, options.seed, moe=True)


if __name__ == "__main__":
    main()
