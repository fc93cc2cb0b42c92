"""Mistral, dense: Llama's layer, whose attention may have a window."""

from __future__ import annotations

from millrace.converters.families.blocks import MODEL, SWIGLU, attention_layer
from millrace.converters.mapping import Family

FAMILY = Family(model=MODEL, layer=lambda facts, layer: attention_layer(facts) + SWIGLU)
