"""Everything that knows Megatron-Core: models, ranks, checkpoints, weights.

Megatron-Core decorates its small fused helpers with torch.compile as it is imported, which alone imports torch's whole
compiler. Without a GPU nothing is compiled (20 s at the first step of a mixture of experts are never regained), so the
compiler is left out here, before any module of ours imports Megatron-Core: 2.5 of 6 seconds of a rank's start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
