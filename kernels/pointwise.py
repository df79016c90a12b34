"""Sums, products and the like of every number by itself. Float32 inside, rounded once.

    add      a + b
    mul      a * b
    scale    factor * a
    softcap  factor * tanh(a / factor)

Meaning: the ops of these names in `compiler.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.activation import tanh
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = {
    "add": lambda a, b, factor: a + b,
    "mul": lambda a, b, factor: a * b,
    "scale": lambda a, b, factor: factor * a,
    "softcap": lambda a, b, factor: factor * torch.tanh(a / factor),
}
BLOCK = 1024


def pointwise(a: Tensor, b: Tensor | None = None, factor: float = 1.0, *, kind: str, run: Run = with_triton) -> Tensor:
    """a and b of one shape, contiguous -> the same shape."""
    check(a, b, kind)
    out = torch.empty_like(a)
    grid = (-(-a.numel() // BLOCK), 1, 1)
    run(Launch("pointwise:apply", grid, (a, b, out, a.numel(), float(factor)), {"KIND": kind, "BLOCK": BLOCK}))
    return out


def pointwise_reference(a: Tensor, b: Tensor | None = None, factor: float = 1.0, *, kind: str) -> Tensor:
    """The same in torch."""
    check(a, b, kind)
    return KINDS[kind](a.float(), None if b is None else b.float(), factor).to(a.dtype)


def check(a: Tensor, b: Tensor | None, kind: str) -> None:
    """TpvcError for tensors that do not belong together, or a kind that nobody knows."""
    if kind not in KINDS:
        raise TpvcError(f"the operation is '{kind}'; expected one of {', '.join(KINDS)}")
    if (b is None) == (kind in ("add", "mul")):
        raise TpvcError(f"'{kind}' was given {1 if b is None else 2} tensors; expected {2 if b is None else 1}")
    if a.dtype not in DTYPES or not a.is_contiguous():
        kind = f"{str(a.dtype).removeprefix('torch.')} with strides {list(a.stride())}"
        raise TpvcError(f"a tensor is {kind}; expected contiguous numbers in 16 or 32 bits")
    if b is not None and (b.shape != a.shape or b.dtype != a.dtype or not b.is_contiguous()):
        raise TpvcError(f"the tensors are {list(a.shape)} and {list(b.shape)}; expected one shape and one dtype")


@jit
def apply(a, b, out, n_numbers, factor, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < n_numbers
    y = tl.load(a + i, mask=real, other=0).to(tl.float32)
    if KIND == "add":
        y += tl.load(b + i, mask=real, other=0).to(tl.float32)
    elif KIND == "mul":
        y *= tl.load(b + i, mask=real, other=0).to(tl.float32)
    elif KIND == "scale":
        y *= factor
    else:
        y = factor * tanh(y / factor)
    tl.store(out + i, y.to(out.dtype.element_ty), mask=real)
