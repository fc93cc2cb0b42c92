"""Mixtral: Llama's attention, and routed SwiGLU experts in every layer."""

from __future__ import annotations

from millrace.converters.families.blocks import MODEL, attention_layer
from millrace.converters.mapping import Family, Line

ROUTER = (Line("mlp.router.weight", "replicated", {"block_sparse_moe.gate.weight": "experts hidden"}),)
EXPERT = (
    Line("linear_fc1.weight", "column", {"w1.weight": "expert_ffn hidden", "w3.weight": "expert_ffn hidden"}),
    Line("linear_fc2.weight", "row", {"w2.weight": "hidden expert_ffn"}),
)

FAMILY = Family(
    model=MODEL,
    layer=lambda facts, layer: attention_layer(facts) + ROUTER,
    expert=EXPERT,
    hf_expert="model.layers.{layer}.block_sparse_moe.experts.{expert}.",
)
