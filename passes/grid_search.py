"""Choose the grid before learning on it: the range with the least importance-weighted rounding error.

For every scale, over ranges between factors of the weight's extremes,

    minimise  sum_j h_j (w_j - round(w_j))^2,      h_j = mean square of input feature j over the calibration tokens

Symmetric grids also try the signed full-range form: the larger extreme lies on code 0 and the scale takes its sign, so
that no code is wasted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvc.compiler.program import Grid
from tpvc.passes.grid import Range, codes, grouped, range_of, shared, storable

BOTH = torch.linspace(1.0, 0.28, 19).tolist()
SIDE = torch.linspace(1.12, 0.52, 11).tolist()
"""Factors tried on both ends together, then on one end of the best range so far, low before high."""


def search(weight: Tensor, importance: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Range:
    """The best grid for a float32 weight [out, in]; importance float32 [in]. Never worse than min/max by that sum."""
    groups, dims = grouped(weight, grid), shared(grid)
    h = grouped(importance[None], grid)
    low, high = groups.amin(dims, keepdim=True).clamp(max=0), groups.amax(dims, keepdim=True).clamp(min=0)
    best = range_of(low, high, grid, dtype)
    least = _error(weight, groups, h, best, grid)
    sweeps = [(p, p) for p in BOTH], [(p, 1.0) for p in SIDE], [(1.0, p) for p in SIDE]
    for sweep in sweeps[:1] if grid.symmetric else sweeps:
        from_low, from_high = low, high
        for p_low, p_high in sweep:
            ends = from_low * p_low, from_high * p_high
            for span in _candidates(*ends, grid, dtype):
                error = _error(weight, groups, h, span, grid)
                better = error < least
                least = torch.where(better, error, least)
                low, high = torch.where(better, ends[0], low), torch.where(better, ends[1], high)
                best = Range(torch.where(better, span.scale, best.scale), torch.where(better, span.zero, best.zero))
    return best


def _candidates(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> list[Range]:
    spans = [range_of(low, high, grid, dtype)]
    if grid.symmetric:
        half = 2 ** (grid.bits - 1)
        extreme = torch.where(high > -low, high, low)
        spans.append(Range(storable(-extreme / half, dtype), torch.full_like(extreme, half)))
    return spans


def _error(weight: Tensor, groups: Tensor, h: Tensor, span: Range, grid: Grid) -> Tensor:
    error = codes(weight, span, grid).mul_(span.scale).sub_(groups).square_().mul_(h)
    return error.sum(shared(grid), keepdim=True)
