"""Gradients of a transformers model under the names of its checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor


def checkpoint_gradients(gradients: Iterable[tuple[str, Tensor]], family: str) -> Iterator[tuple[str, Tensor]]:
    """transformers stacks the experts of a layer, and calls model what a hybrid's checkpoint calls backbone."""
    root = "backbone." if family == "nemotron_h" else "model."
    for parameter, gradient in gradients:
        name = re.sub(r"^model\.", root, parameter)
        experts, _, stacked = name.rpartition(".")
        if stacked not in ("gate_up_proj", "down_proj"):
            yield name, gradient
            continue
        for expert, own in enumerate(gradient):
            names = ["gate_proj", "up_proj"] if stacked == "gate_up_proj" else ["down_proj"]
            for part, piece in zip(names, own.chunk(len(names)), strict=True):
                yield f"{experts}.{expert}.{part}.weight", piece
