"""Qwen3, mixture of experts: Qwen3's attention, and routed SwiGLU experts in the layers that the mask names."""

from __future__ import annotations

from millrace.converters.families.blocks import EXPERT, MODEL, ROUTER, SWIGLU, attention_layer
from millrace.converters.mapping import Family, Line, ModelFacts


def layer(facts: ModelFacts, layer: int) -> tuple[Line, ...]:
    return attention_layer(facts) + (ROUTER if facts.layers[layer].ffn == "experts" else SWIGLU)


FAMILY = Family(model=MODEL, layer=layer, expert=EXPERT)
