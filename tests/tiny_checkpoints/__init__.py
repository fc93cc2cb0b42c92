"""Tiny random Hugging Face checkpoints of the supported families, written without importing transformers.

Weights are scaled so that logits spread widely: two seeds give different greedy answers, and a tensor that is swapped,
transposed or left out shows in the outputs. Norm weights are drawn around 1, so that mixing two of them up shows too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .families import FAMILIES, YARN, Config, config_of, hf_shapes
from .tokenizer import CHAT_TEMPLATE, IM_END, IM_START, PAD, SPECIAL_TOKENS, VOCABULARY, write_tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "FAMILIES",
    "IM_END",
    "IM_START",
    "PAD",
    "SPECIAL_TOKENS",
    "VOCABULARY",
    "YARN",
    "hf_shapes",
    "random_tensors",
    "write_checkpoint",
    "write_tokenizer",
]


def write_checkpoint(
    family: str,
    path: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tied: bool | None = None,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `family` (a key of FAMILIES) into folder `path`.

    `overrides` are keys of config.json; `shards` > 1 writes that many files and an index. Without `tied` the family's
    default holds: gemma3_text ties its head without saying so in config.json, as its releases do.
    nemotron_h takes its layers from `hybrid_override_pattern` ("M-*M" unless overridden; with an E, experts are added).
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if tied is None and not FAMILIES[family].tied:
        tied = False
    config = config_of(family, {"torch_dtype": dtype, **overrides})
    if tied is not None:
        config["tie_word_embeddings"] = tied
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": IM_END, "pad_token_id": PAD, "do_sample": True, "temperature": 1.0}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(path)
    _write_shards(path, random_tensors(config, seed, getattr(torch, dtype)), shards)
    return path


def random_tensors(config: Config, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `dtype`; the router's correction bias is in float32, as in every release."""
    generator = torch.Generator().manual_seed(seed)
    gemma = config["model_type"] == "gemma3_text"
    tensors = {}
    for name, shape in hf_shapes(config).items():
        drawn = _draw(name, shape, generator)
        if gemma:
            drawn = _as_gemma(name, drawn)
        tensors[name] = drawn if name.endswith("e_score_correction_bias") else drawn.to(dtype)
    return tensors


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values as a trained model may hold them, chosen by the last part of the name."""
    noise = torch.randn(shape, generator=generator)
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":
        return torch.log(1 + 15 * noise.abs().clamp(max=1))
    if last == "dt_bias":
        # Inverse softplus of steps spread by logarithm around 0.01, so that some fall below time_step_min (0.001).
        step = torch.exp(noise * 1.5 - 4.6)
        return step + torch.log(-torch.expm1(-step))
    if last == "e_score_correction_bias":
        return 0.2 * noise
    if last == "bias":
        return 0.3 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    if "embed" in name or "lm_head" in name:
        return 0.3 * noise
    return noise * math.prod(shape[1:]) ** -0.5


def _as_gemma(name: str, drawn: Tensor) -> Tensor:
    """Norms hold their distance from 1. A small embedding and head under a large last norm, because the embedding is
    scaled and mostly the head as well: otherwise every answer would be the token that was read."""
    if "embed" in name or "lm_head" in name:
        return drawn / 5
    if drawn.dim() > 1:
        return drawn
    return (5 * drawn if name == "model.norm.weight" else drawn) - 1


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
