"""Bytes that weights take, in files and by themselves."""

from __future__ import annotations

from typing import Any


def weight_bytes(program: Any) -> int:
    """Bytes of the weight files a Program was loaded from; what its parameters hold where there is no such file."""
    source = program.source
    files = list(source.weights) if source else []
    if files and all(f.is_file() for f in files):
        return sum(f.stat().st_size for f in files)
    return sum(parameter_bytes(p) for p in program.params.values())


def parameter_bytes(parameter: Any) -> int:
    """Bytes a parameter needs when stored: codes, scales (2 bytes each) and zero points for an integer one."""
    from math import prod

    from tpvc.compiler.program import grid_of

    grid, shape = grid_of(parameter), tuple(parameter.shape)
    if grid is None:
        return prod(shape) * parameter.dtype.itemsize
    groups = 1 if grid.group == 0 else shape[0] * (shape[1] // grid.columns(shape[1]))
    zeros = 0 if grid.symmetric else groups * grid.bits // 8
    return prod(shape) * grid.bits // 8 + 2 * groups + zeros
