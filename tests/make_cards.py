"""Makes the cards in converters/cards/: every verification of a tiny model of each family.

    python tests/make_cards.py [FAMILY ...]

Run it from a clean checkout, so that the commit on the cards is the code that was verified.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiny_checkpoints import write_checkpoint

from millrace.converters.mapping import FAMILIES

CARDS = Path(__file__).resolve().parents[1] / "converters" / "cards"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h": ("nemotron_h", {"hybrid_override_pattern": "M-*M"}),
    "nemotron_h_moe": ("nemotron_h", {"hybrid_override_pattern": "MEM*E-"}),
}
"""Card -> family and what its config.json says otherwise, of the families that have more than one kind of model."""


def main(wanted: list[str]) -> int:
    models = {family: (family, {}) for family in FAMILIES if family != "nemotron_h"} | VARIANTS
    failed = []
    for name, (family, overrides) in models.items():
        if wanted and name not in wanted:
            continue
        with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
            write_checkpoint(family, Path(folder) / name, **overrides)
            print(f"== {name}", flush=True)  # noqa: T201
            command = [sys.executable, "-m", "millrace.cli", "verify", "card", "--hf", name]
            if subprocess.run([*command, "--out", str(CARDS / f"{name}.yaml")], cwd=folder, check=False).returncode:
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")  # noqa: T201
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
