"""The one error a user is meant to read."""

from __future__ import annotations

import reprlib
from typing import Any


class TpvcError(Exception):
    """Bad input: one sentence saying what was found, what was expected and what to do; exit code 2."""


_CUT = reprlib.Repr()
_CUT.maxlevel, _CUT.maxlist, _CUT.maxdict, _CUT.maxstring, _CUT.maxother, _CUT.maxlong = 3, 8, 8, 80, 80, 40


def short(value: Any) -> str:
    """A value from a file as an error shows it: `repr`, cut where it is long or deep."""
    text = _CUT.repr(value)
    return text if len(text) <= 240 else f"{text[:240]}..."


def printable(text: str) -> str:
    """`text` for a terminal: what is no letter, sign or line's end, as a file may hold it to move the cursor, is
    spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
