"""Llama 2 and 3: grouped-query attention and SwiGLU."""

from __future__ import annotations

from millrace.converters.families.blocks import MODEL, SWIGLU, attention_layer
from millrace.converters.mapping import Family

FAMILY = Family(model=MODEL, layer=lambda facts, layer: attention_layer(facts) + SWIGLU)
