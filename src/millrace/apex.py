"""Which package is installed under the name apex: the index's is not NVIDIA's."""

from __future__ import annotations

from importlib import util
from pathlib import Path


def is_unrelated_apex() -> bool:
    """Whether an apex is installed that has no optimizers: the unrelated package of that name. It is not imported, for
    that ends in an ImportError of its own."""
    spec = util.find_spec("apex")
    if spec is None:
        return False
    return not any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ())
