"""Rows of activations rounded to 8 bits, each on a symmetric grid of its own, found while the model runs.

    scale = max|x| / range       int8: range 127; fp8 (e4m3): 448
    code = x / scale             rounded half to even

Meaning: `compiler.ops.row_codes`, bit for bit: quotients are divided and not multiplied with an inverse, and integers
are rounded by adding 1.5 * 2^23, where float32 has no digits behind the point. A program holds one row in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import ROW_FLOOR, ROW_RANGE, row_codes
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, eq=False)
class Rows:
    """codes int8 or float8_e4m3fn [M, K], scale float32 [M]: row m is codes[m] * scale[m]. dtype: what it was."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        return next(kind for kind, dtype in CODES.items() if dtype == self.codes.dtype)


def round_rows(x: Tensor, *, kind: str, run: Run = with_triton) -> Rows:
    """x [M, K] in 16 or 32 bits, rows of any stride. kind: "int8" or "fp8"."""
    check(x, kind)
    rows, width = x.shape
    found = Rows(x.new_empty(rows, width, dtype=CODES[kind]), x.new_empty(rows, dtype=torch.float32), x.dtype)
    block = 1 << (width - 1).bit_length()
    run(
        Launch(
            "round_rows:round_row",
            (rows, 1, 1),
            (x, found.codes, found.scale, x.stride(0), width),
            {"RANGE": ROW_RANGE[kind], "FLOOR": ROW_FLOOR, "BLOCK": block},
            warps=min(max(block // 512, 1), 16),
        )
    )
    return found


def round_rows_reference(x: Tensor, *, kind: str) -> Rows:
    """The same in torch."""
    check(x, kind)
    codes, scale = row_codes(x, kind)
    return Rows(codes, scale[:, 0], x.dtype)


def check(x: Tensor, kind: str) -> None:
    """TpvcError for what are no rows, or a kind that nobody knows."""
    if kind not in CODES:
        raise TpvcError(f"rows are to be rounded to '{kind}'; expected {' or '.join(CODES)}")
    if x.dtype not in DTYPES or x.ndim != 2 or x.stride(1) != 1:
        found = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise TpvcError(f"the activations to round are {found}; expected rows of numbers in 16 or 32 bits")


@jit
def round_row(x, codes, scale, stride, width, RANGE: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
    """Row program_id(0)."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    real = j < width
    values = tl.load(x + row * stride + j, mask=real, other=0).to(tl.float32)
    step = tl.math.div_rn(tl.maximum(tl.max(tl.abs(values), 0), FLOOR), tl.full((), RANGE, tl.float32))
    ratio = tl.math.div_rn(values, tl.zeros_like(values) + step)
    if codes.dtype.element_ty == tl.int8:
        found = ((ratio + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    else:
        found = ratio.to(codes.dtype.element_ty)
    tl.store(codes + row * width + j, found, mask=real)
    tl.store(scale + row, step)
