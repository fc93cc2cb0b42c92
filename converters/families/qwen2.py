"""Qwen2 and 2.5, dense: Llama's layer with biases on queries, keys and values."""

from __future__ import annotations

from millrace.converters.families.blocks import MODEL, SWIGLU, attention_layer
from millrace.converters.mapping import Family

FAMILY = Family(model=MODEL, layer=lambda facts, layer: attention_layer(facts) + SWIGLU)
