"""Gemma 3, text: Qwen3's attention, a gated MLP, and norms before and behind both."""

from __future__ import annotations

from millrace.converters.families.blocks import ATTENTION, MODEL, QK_NORM, SWIGLU
from millrace.converters.mapping import Family, Line

NORMS = tuple(
    Line(f"{megatron}.weight", "replicated", {f"{hf}.weight": "hidden"})
    for megatron, hf in (
        ("input_layernorm", "input_layernorm"),
        ("post_attention_layernorm", "post_attention_layernorm"),
        ("pre_mlp_layernorm", "pre_feedforward_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    )
)

FAMILY = Family(model=MODEL, layer=lambda facts, layer: NORMS + ATTENTION + QK_NORM + SWIGLU)
