"""The small random base model of the laptop recipes, with a tokenizer made for their texts."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
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

logger = logging.getLogger("make_data")

VOCABULARY = 640
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("user", "assistant", "system", "response_1", "response_2")


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
    always = [*(f"{role}\n" for role in ROLES), *(str(result) for result in range(28))]
    tokenizer.train_from_iterator([*texts, *(always * 100)], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in thinking])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


Kind = Literal["dense", "moe", "hybrid"]

LAYERS_OF_THE_HYBRID = "M*EM*E"
"""Mamba-2 before attention, which then needs no positions of its own, and experts."""


def base_config(tokenizer: PreTrainedTokenizerFast, kind: Kind) -> Qwen3Config | Qwen3MoeConfig | NemotronHConfig:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
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


def write_base(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, kind: Kind) -> None:
    torch.manual_seed(seed)
    config = base_config(tokenizer, kind)
    model = MODELS[kind](config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("%s: %s with %d parameters", folder, config.model_type, model.num_parameters())
