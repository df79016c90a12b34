"""Round-to-nearest: the baseline of every table, the start of every learned rounding, and the fallback."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.freed import give_back
from tpvc.compiler.program import Grid, Grids, Node, Program, QTensor, grid_for, linears, read
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.store import BlockStore
from tpvc.passes.checks import check_float, check_grid, linear_record
from tpvc.passes.grid import to_nearest

ROWS_AT_ONCE = 1 << 20
"""Weights rounded at a time when rows are independent: bounds the working memory of a large head."""


def quantize(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> QTensor:
    """Round-to-nearest of a weight [out, in] of any float dtype."""
    rows = weight.shape[0] if grid.group == 0 else max(1, ROWS_AT_ONCE // weight.shape[1])
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for into, chunk in zip(codes.split(rows), weight.split(rows), strict=True):
        chunk = chunk.float()
        part = to_nearest(chunk, grid, dtype)
        into.copy_(part.codes)
        scales.append(part.scale)
        zeros.append(part.zero)
    zero = None if grid.symmetric else torch.cat(zeros)
    return QTensor(codes, torch.cat(scales), zero, grid, dtype)


@dataclass(frozen=True)
class RoundToNearest:
    """Round the linears of every block, or with `where="epilogue"` those after the last block: the head.

    A head that shares its matrix with the embedding stays shared: the embedding then reads the same integers.
    """

    grid: Grids
    store: BlockStore
    where: str = "blocks"
    scale_dtype: torch.dtype = torch.float32
    progress: Progress = silent

    def __call__(self, program: Program) -> Program:
        parts: list[tuple[int, tuple[Node, ...]]]
        if self.where == "epilogue":
            parts = [(program.blocks, program.epilogue)]
        else:
            parts = [(i, program.block(i)) for i in range(program.blocks)]
        every = tuple(n for _, nodes in parts for n in nodes)
        check_grid(self.grid, program, every)
        check_float(program, every)
        for done, (index, nodes) in enumerate(parts):
            self.progress("round to nearest", done, len(parts), "")
            give_back()
            finished = self.store.finished(index)
            if finished is None:
                rounded = {}
                for node in linears(nodes):
                    name = node.params["weight"]
                    rounded[name] = quantize(read(program.params[name]), grid_for(self.grid, name), self.scale_dtype)
                notes = [linear_record(n, rounded[n.params["weight"]]) for n in linears(nodes)]
                params = self.store.save(index, rounded, {"block": index, "linears": notes}, None)
            else:
                params = finished[0]
            program = program.with_params(params)
        self.progress("round to nearest", len(parts), len(parts), "")
        return program
