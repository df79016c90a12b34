"""Numbers with units that a person can read, the same in the terminal and in report.html."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Bytes: 12345678 -> "12.3 MB" (powers of ten, as disks are sold)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def seconds(value: float) -> str:
    """0.0123 -> "12 ms", 3.21 -> "3.2 s", 245 -> "4 min 05 s", 7380 -> "2 h 03 min"."""
    if 0 < value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def perplexity(nats: float) -> float:
    """exp of a loss in nats a token; inf where that is larger than any float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
