"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, note). Everywhere a `progress` of None means silence."""


def silent(stage: str, done: int, total: int, note: str) -> None:
    """The Progress that says nothing."""
