"""Some features of every group of a row: the queries, keys or values of a linear that yields all three.

A row of D features is `groups` runs of D / groups; features start .. stop - 1 of every run are kept. Meaning:
`compiler.ops.split`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton

BLOCK = 1024


def split(x: Tensor, groups: int, start: int, stop: int, *, run: Run = with_triton) -> Tensor:
    """x [M, D], contiguous -> [M, groups * (stop - start)]."""
    check(x, groups, start, stop)
    rows, width = x.shape
    kept = groups * (stop - start)
    out = x.new_empty(rows, kept)
    args = (x, out, width, kept, width // groups, stop - start, start)
    run(Launch("split:keep", (rows, -(-kept // BLOCK), 1), args, {"BLOCK": BLOCK}))
    return out


def split_reference(x: Tensor, groups: int, start: int, stop: int) -> Tensor:
    """The same in torch."""
    check(x, groups, start, stop)
    return x.unflatten(-1, (groups, -1))[..., start:stop].flatten(-2)


def check(x: Tensor, groups: int, start: int, stop: int) -> None:
    """TpvcError for features that the rows do not have."""
    if x.ndim != 2 or not x.is_contiguous() or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TpvcError(f"the values to split are {list(x.shape)}; expected contiguous rows in 16 or 32 bits")
    if x.shape[1] % groups or not 0 <= start < stop <= x.shape[1] // groups:
        raise TpvcError(
            f"features {start} to {stop} of {groups} groups were asked of rows of {x.shape[1]}; expected groups that"
            " divide them, and features inside one"
        )


@jit
def keep(x, out, width, kept, run, part, start, BLOCK: tl.constexpr):
    """BLOCK of the features that row program_id(0) keeps: `part` of every run of `run`."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = j < kept
    y = tl.load(x + row * width + j // part * run + start + j % part, mask=real, other=0)
    tl.store(out + row * kept + j, y, mask=real)
