"""What commands print on."""

from __future__ import annotations

from rich.console import Console


def plain() -> Console:
    """Standard output for text as it is: neither coloured, nor wrapped, nor read as markup or as names of emoji."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
