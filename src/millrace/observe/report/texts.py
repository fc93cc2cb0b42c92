"""Numbers and times as people read them, and text made safe for HTML."""

from __future__ import annotations

import html
import time

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


def short_number(value: float | None) -> str:
    """1234567 as 1.23M; a dash for what is not known."""
    if value is None:
        return "–"
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds in the largest two units that they fill."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(stamp: float) -> str:
    """A time of the ledger in the zone of the reader of the terminal."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(stamp)).strip()


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def points(change: float) -> str:
    """A difference of rates in points, with its sign; the minus is as wide as the plus."""
    return f"{100 * change:+.1f}".replace("-", "−")


def clipped(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
