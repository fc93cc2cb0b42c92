"""The model and its adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BUILT_IN_TEMPLATES = ("nemotron",)
"""Chat templates that Millrace ships, by the names that `model.chat_template` takes."""
FAMILY_TEMPLATES = {"nemotron_h": "nemotron"}
"""The built-in template of a family, for checkpoints of it that have none."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    """Rank r of every adapter: its factors are A [r, inputs] and B [outputs, r]."""
    alpha: float = 32.0
    """Numerator of the scaling: a weight becomes W + alpha / r * B A."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA), which keeps high ranks learning."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers that get an adapter, by the last part of their Hugging Face names, such as q_proj or down_proj;
    all-linear: every one that tensor-parallel ranks cut, those of experts included. Routers, embeddings and the output
    layer get none."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is zeroed in training."""
    adapter: str | None = None
    """Folder of a PEFT adapter to start from, with the same rank, alpha and targets; fresh ones when absent."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """Folder of the Hugging Face checkpoint to start from (config.json, safetensors, tokenizer)."""
    chat_template: str | None = None
    """`nemotron`, the format of Nemotron-Cascade 2 (without its wording of the tools' instructions), or a Jinja file;
    the export then holds it. When absent the checkpoint's own, and for a nemotron_h that has none `nemotron`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of parameters and activations in the trainer. Optimizer state is float32 in any case."""
    lora: LoraConfig | None = None
    """Train LoRA adapters of the linear layers and leave the model itself as it is. Engines, and the export, get the
    weights with the adapters merged in. null trains all parameters."""
