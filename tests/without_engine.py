"""Marks tests of what a machine without Transformer Engine does."""

import pytest

from millrace.megatron.kernels import transformer_engine_is_there

without_engine = pytest.mark.skipif(transformer_engine_is_there(), reason="Transformer Engine is on this machine")
