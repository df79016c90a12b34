"""The numbers in a Triton package, as the parameters that they were made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program, grid_of
from tpvc.compiler.verification.matrices import Found, Value, names
from tpvc.kernels.slab import Slabs, dequantise, pack, unpack


def read(folder: Path, program: Program) -> Found:
    """Every parameter of `program` in the package; some lie side by side in one, called by their names with "+"."""
    from tpvc.compiler.backends import triton

    model, wanted = triton.read(folder), set(names(program))
    for joined, held in model.params.items():
        start = 0
        for name in (name for name in joined.split("+") if name in wanted):
            own = slice(start, start := start + program.params[name].shape[0])
            yield name, _reading(program, name, joined, held, own, model.dtype, folder)


def _reading(
    program: Program, name: str, joined: str, held: Slabs | torch.Tensor, own: slice, dtype: torch.dtype, folder: Path
) -> Callable[[], Value]:
    def read() -> Value:
        if not isinstance(held, Slabs):
            return held if joined == name else held[own]
        part = replace(held, **{key: t[:, own].contiguous() for key, t in held.tensors.items()})
        if part.scale is None:
            return dequantise(part, dtype)
        if (grid := grid_of(program.params[name])) is None:
            raise TpvcError(f"'{folder}' holds integers for '{name}', which is in float in the reference")
        packed = part.bits, part.group, part.zero is None, part.middle
        wanted = grid.bits if grid.bits <= 4 else 8, grid.columns(part.depth), grid.symmetric, 2 ** (grid.bits - 1)
        if packed != wanted:
            found = f"'{folder}' holds '{name}' with (bits, group, symmetric, middle) {packed}"
            raise TpvcError(f"{found}, expected {wanted} for {grid}; it was rounded differently")
        q = unpack(part, grid)
        again = pack(q).tensors
        for key, tensor in part.tensors.items():
            if not torch.equal(again[key], tensor):
                raise TpvcError(f"'{folder}' fills up '{joined}.{key}' with something else than zeros; export it again")
        return q

    return read
