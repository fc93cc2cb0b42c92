"""Reading the JSON lines of a run while it is written, or after it was killed: what is torn is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, oldest first; no file gives none, a line that a kill cut short is left out."""
    if not path.exists():
        return []
    found = (parse_line(line) for line in path.read_bytes().splitlines())
    return [entry for entry in found if entry is not None]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a line, or None where half of it is missing."""
    try:
        entry = json.loads(line)
    except ValueError:  # not JSON, or cut inside a character
        return None
    return entry if isinstance(entry, dict) else None
