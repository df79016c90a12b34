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
    """Bytes a parameter needs when stored: codes, scales and zero points for an integer one."""
    from math import prod

    from tpvc.compiler.program import grid_of, scale_dtype_of

    grid, shape = grid_of(parameter), tuple(parameter.shape)
    if grid is None:
        return prod(shape) * parameter.dtype.itemsize
    return -(-matrix_bits(shape, grid, scale_dtype_of(parameter)) // 8)


def matrix_bits(shape: tuple[int, int], grid: Any, scale_dtype: Any) -> int:
    """Bits of codes, scales and zero points of a matrix [out, in] on a Grid, each as wide as it has to be."""
    rows, columns = shape
    scales = 1 if grid.group == 0 else rows * (columns // grid.columns(columns))
    return rows * columns * grid.bits + scales * (8 * scale_dtype.itemsize + (0 if grid.symmetric else grid.bits))
