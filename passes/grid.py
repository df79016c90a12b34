"""Lay a uniform grid over a weight, and round to it.

    symmetric    s = 2 max|w| / (2^b - 1)              code = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1) + 2^(b-1)
    asymmetric   s = (max(w, 0) - min(w, 0)) / (2^b - 1), z = clamp(round(-min / s), 0, 2^b - 1)
                                                       code = clamp(round(w / s), -z, 2^b - 1 - z) + z

over the weights that share a scale (FlexRound's initialisation, arXiv 2306.00317). The scale is rounded to the dtype it
will be stored in before the codes are chosen, so that what is written is what was rounded with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.program import Grid, QTensor

SCALE_FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class Range:
    """A grid laid over a weight: what is fixed before codes are chosen.

    scale  float32 [out, groups, 1] ([1, 1, 1] per tensor), exact in the storage dtype; never zero, may be negative
    zero   float32 of the same shape, integers in 0 .. 2^bits - 1
    """

    scale: Tensor
    zero: Tensor


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """View [out, in] as [out, groups, columns]; scales broadcast against it."""
    return weight.unflatten(1, (-1, grid.columns(weight.shape[1])))


def shared(grid: Grid) -> tuple[int, ...]:
    """Dimensions of a grouped weight that share one scale."""
    return (0, 1, 2) if grid.group == 0 else (2,)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to `dtype`, kept away from zero: 1e-8, in float16 2^-20, where 4 bits of the number are left."""
    floor = max(SCALE_FLOOR, torch.finfo(dtype).tiny / 64)
    sign = torch.where(scale < 0, -1.0, 1.0)
    return sign * scale.abs().clamp(floor, torch.finfo(dtype).max).to(dtype).float().clamp(min=floor)


def range_of(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> Range:
    """The grid that spans low..high (each of the scale's shape; low <= 0 <= high for an asymmetric one)."""
    top = 2**grid.bits - 1
    if grid.symmetric:
        scale = storable(2 * torch.maximum(high, -low) / top, dtype)
        return Range(scale, torch.full_like(scale, 2 ** (grid.bits - 1)))
    scale = storable((high - low) / top, dtype)
    return Range(scale, (-low / scale).round().clamp(0, top))


def min_max(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Range:
    """The grid from the extremes of a float32 weight [out, in], zero included."""
    groups, dims = grouped(weight, grid), shared(grid)
    low, high = groups.amin(dims, keepdim=True).clamp(max=0), groups.amax(dims, keepdim=True).clamp(min=0)
    return range_of(low, high, grid, dtype)


def codes(weight: Tensor, span: Range, grid: Grid) -> Tensor:
    """Nearest codes, float32 of `grouped(weight)`'s shape, relative to zero: -zero .. 2^bits - 1 - zero."""
    ratio = (grouped(weight, grid) / span.scale).round_()
    return torch.minimum(torch.maximum(ratio, -span.zero), 2**grid.bits - 1 - span.zero)


def qtensor(shape: tuple[int, int], relative: Tensor, span: Range, grid: Grid, dtype: torch.dtype) -> QTensor:
    """The QTensor of codes relative to zero, as `codes` gives them; in host memory, whatever the device."""
    zero = None if grid.symmetric else span.zero.to(torch.uint8).squeeze(-1).cpu()
    codes = (relative + span.zero).to(torch.uint8).reshape(shape).cpu()
    return QTensor(codes, span.scale.squeeze(-1).cpu(), zero, grid, dtype)


def on_grid(weight: Tensor, span: Range, grid: Grid, dtype: torch.dtype) -> QTensor:
    """The nearest codes of a float32 weight [out, in] on a given grid."""
    return qtensor(tuple(weight.shape), codes(weight, span, grid), span, grid, dtype)


def to_nearest(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> QTensor:
    """Round-to-nearest of a float32 weight [out, in], on the grid from its extremes."""
    return on_grid(weight, min_max(weight, grid, dtype), grid, dtype)


def span_of(value: QTensor, device: torch.device) -> Range:
    """The grid that a QTensor's codes lie on."""
    zero = torch.full_like(value.scale, 2 ** (value.grid.bits - 1)) if value.zero is None else value.zero.float()
    return Range(value.scale.unsqueeze(-1).to(device), zero.unsqueeze(-1).to(device))
