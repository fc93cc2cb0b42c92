"""Tiny random Hugging Face checkpoints of the supported families, written without importing transformers.

Weights are scaled so that logits spread widely: two seeds give different greedy answers, and a tensor that is swapped,
transposed or left out shows in the outputs. Norm weights are drawn around 1, so that mixing two of them up shows too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

VOCABULARY = 320
PAD, IM_START, IM_END = 256, 257, 258
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_BASE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    hidden_act="silu",
    max_position_embeddings=2048,
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    attention_bias=False,
    attention_dropout=0.0,
    use_cache=True,
    bos_token_id=PAD,
    pad_token_id=PAD,
    eos_token_id=IM_END,
)
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": dict(architectures=["Qwen3ForCausalLM"], rope_theta=1000000.0),
    "qwen3_moe": dict(
        architectures=["Qwen3MoeForCausalLM"],
        rope_theta=1000000.0,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.0,
    ),
    "llama": dict(architectures=["LlamaForCausalLM"], rope_theta=500000.0, mlp_bias=False),
}


def write_checkpoint(
    family: str,
    path: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tied: bool = False,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `family` (qwen3, qwen3_moe, llama) into folder `path`.

    `overrides` are keys of config.json; `shards` > 1 writes that many files and an index.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": family,
        **_BASE,
        **_FAMILIES[family],
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        **overrides,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": IM_END, "pad_token_id": PAD, "do_sample": True, "temperature": 1.0}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(path)
    _write_shards(path, random_tensors(config, seed, getattr(torch, dtype)), shards)
    return path


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers stores for this config.json."""
    hidden, head = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[at + f"self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, q)
        if config["model_type"].startswith("qwen3"):
            shapes[at + "self_attn.q_norm.weight"] = (head,)
            shapes[at + "self_attn.k_norm.weight"] = (head,)
        shapes.update(_mlp_shapes(config, layer, at + "mlp."))
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _mlp_shapes(config: dict[str, Any], layer: int, at: str) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    experts = config.get("num_experts", 0)
    sparse = experts and layer not in config["mlp_only_layers"] and (layer + 1) % config["decoder_sparse_step"] == 0
    ffn = config["moe_intermediate_size"] if sparse else config["intermediate_size"]
    shapes = {at + "gate.weight": (experts, hidden)} if sparse else {}
    for prefix in [f"{at}experts.{e}." for e in range(experts)] if sparse else [at]:
        shapes[prefix + "gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "down_proj.weight"] = (hidden, ffn)
    return shapes


def random_tensors(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, generator).to(dtype) for name, shape in hf_shapes(config).items()}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * noise
    if "embed_tokens" in name or "lm_head" in name:
        return 0.3 * noise
    return noise * shape[1] ** -0.5


def write_tokenizer(path: Path) -> None:
    """One token a byte (ids 0 to 255), three special tokens, and ChatML as the chat template."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_vocabulary() -> dict[str, int]:
    """The printable character that byte-level tokenizers show for each byte, with the byte as its id."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {characters[byte]: byte for byte in range(256)}


def _write_shards(path: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for n in range(shards):
        part = {name: tensors[name] for name in names[n::shards]}
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
