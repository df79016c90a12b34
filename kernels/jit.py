"""Triton where it is installed. Where it is not, kernel files can still be imported: their references, checks and
packings need torch alone, and so does a package that was compiled elsewhere."""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # a machine that runs packages and compiles none
    tl = None

    def jit(function):
        """The Triton body stays a plain function, which nobody calls."""
        return function


__all__ = ["jit", "tl"]
