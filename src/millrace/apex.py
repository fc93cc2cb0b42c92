"""Which package is installed under the name apex: the index's is not NVIDIA's."""

from __future__ import annotations

from importlib import util


def is_unrelated_apex() -> bool:
    """Whether an apex is installed that has no optimizers: the unrelated package of that name."""
    return util.find_spec("apex") is not None and util.find_spec("apex.optimizers") is None
