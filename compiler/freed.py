"""Freed memory, handed back to the system.

glibc keeps pieces of up to 32 MB for later and fills the gaps between them badly where sizes vary, so that a process
holds half as much again as it uses. Between two phases of work, which want other sizes, it is better given back: the
next one then takes what it needs, and `tpvc plan` can say how much that is.
"""

from __future__ import annotations

import ctypes
from functools import cache


def give_back() -> None:
    """Return what was freed to the system; nothing where the C library has no `malloc_trim`."""
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> ctypes._CFuncPtr | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return None
