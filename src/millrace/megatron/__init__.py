"""Everything that knows Megatron-Core: models, ranks, checkpoints, weights.

Megatron-Core decorates its small fused helpers with torch.compile as it is imported, which alone imports torch's whole
compiler. Without a GPU nothing is compiled (20 s at the first step of a mixture of experts are never regained), so the
compiler is left out here, before any module of ours imports Megatron-Core: 2.5 of 6 seconds of a rank's start.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

ENGINE = "transformer_engine"


def _hide_broken_engine() -> str | None:
    """Have a Transformer Engine that does not load stand for an absent one, and say why it does not.

    It often is there in part: without its extension for torch, with one built for another torch, or without CUDA's
    libraries. Its outer package imports all the same, which Megatron-Core takes for the whole, and ends.
    """
    if importlib.util.find_spec(ENGINE) is None:
        return None
    try:
        importlib.import_module(f"{ENGINE}.pytorch")
    except Exception as error:  # noqa: BLE001 - each cause has an error of its own
        for name in [name for name in sys.modules if name.partition(".")[0] == ENGINE]:
            del sys.modules[name]
        sys.modules[ENGINE] = None  # type: ignore[assignment]  # each import of it is an ImportError from here on
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


BROKEN_ENGINE = _hide_broken_engine()
"""Why an installed Transformer Engine does not load."""


def _import_without_compiler() -> None:
    def leave_as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return function if function is not None else leave_as_it_is

    compiles = torch.compile
    torch.compile = leave_as_it_is  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compiles


if not torch.cuda.is_available():
    _import_without_compiler()
