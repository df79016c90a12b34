"""JSON from files that others wrote: what Python's reader lets pass, or chokes on, is refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

DEEPEST = 64
"""Levels of lists and objects in each other."""


def parse(text: str) -> Any:
    """The value of `text`. ValueError, with a reason that fits into a sentence, for what is not JSON, for a number of
    thousands of digits, for a name that stands twice in one object (readers differ in which one they take), and for
    more than DEEPEST levels, on which whatever walks through the value would choke. NaN and Infinity, which Python
    writes, are read."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [v for part in level if isinstance(part, dict | list) for v in _inside(part)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"'{next(n for n, c in counts.items() if c > 1):.60}' stands twice in one object")
    return found


def _inside(part: dict | list) -> Any:
    return part.values() if isinstance(part, dict) else part
