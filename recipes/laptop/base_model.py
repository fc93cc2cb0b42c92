"""The small random base model of the laptop recipes, with a tokenizer made for their texts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.getLogger("make_data")

VOCABULARY, TOOL_VOCABULARY = 640, 1000
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }}"
    "({{ tool.function.parameters.properties | join(', ') }})\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML. Of tools only the names and their arguments' names are told, which keeps prompts short; calls are JSON."""
THINKING, CALLING = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
WORDS = r" ?[a-z][\w@.-]*|\d[\d-]*(?=\d\d)|\d\d|[\w@.-]+|[^\w]+"
"""What a token of the tools' tokenizer lies in: a whole word, name or address, or all signs between two of them; of a
date or an id the last two digits apart. Names and numbers, which have to be copied, have the same tokens everywhere,
whether or not a space stands before them."""
ROLES = ("user", "assistant", "system", "response_1", "response_2")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML; <think> and </think> are tokens that stay in the text."""
    # a number is one token even where it is rare, and the roles are part of the template, not of the texts
    always = [*(f"{role}\n" for role in ROLES), *(str(result) for result in range(28))]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _train([*texts, *(always * 100)], split, VOCABULARY, THINKING)


def train_tool_tokenizer(rows: Iterable[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """The same for conversations with tool calls, with few tokens: names, ids and the signs of JSON are one each."""
    texts: list[str] = []
    for row in rows:
        ((text,), _) = render_jinja_template([row["messages"]], tools=row["tools"], chat_template=CHAT_TEMPLATE)
        texts += re.split(r"<\|im_start\|>|<\|im_end\|>|</?tool_call>", text)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), whole])
    return _train(texts, split, TOOL_VOCABULARY, CALLING)


def _train(
    texts: Iterable[str], split: pre_tokenizers.PreTokenizer, vocabulary: int, markers: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(markers),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


Kind = Literal["dense", "moe", "hybrid"]

LAYERS_OF_THE_HYBRID = "M*EM*E"
"""Mamba-2 before attention, which then needs no positions of its own, and experts."""


def base_config(
    tokenizer: PreTrainedTokenizerFast, kind: Kind, positions: int = 512
) -> Qwen3Config | Qwen3MoeConfig | NemotronHConfig:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.04,
    }
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 192, "norm_topk_prob": True}
    if kind == "hybrid":
        return NemotronHConfig(
            **shape,
            **experts,
            hybrid_override_pattern=LAYERS_OF_THE_HYBRID,
            mamba_num_heads=8,
            mamba_head_dim=32,
            n_groups=2,
            ssm_state_size=16,
            chunk_size=32,
            n_routed_experts=4,
            moe_shared_expert_intermediate_size=192,
        )
    shape |= {"num_hidden_layers": 2, "rope_theta": 10000.0}
    return Qwen3MoeConfig(**shape, **experts, num_experts=4) if kind == "moe" else Qwen3Config(**shape)


MODELS = {"dense": Qwen3ForCausalLM, "moe": Qwen3MoeForCausalLM, "hybrid": NemotronHForCausalLM}


def write_base(
    folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, kind: Kind, *, positions: int = 512
) -> None:
    """`positions`: the longest sequence, in tokens."""
    torch.manual_seed(seed)
    tokenizer.model_max_length = positions
    config = base_config(tokenizer, kind, positions)
    model = MODELS[kind](config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("%s: %s with %d parameters", folder, config.model_type, model.num_parameters())
