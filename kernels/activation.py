"""Activations: alone, or of a gate times what comes up beside it. Float32 inside, rounded once.

Kinds and meaning: `compiler.ops.activation`, and `mul` for the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import ACTIVATIONS
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 1024


def activation(x: Tensor, *, kind: str, run: Run = with_triton) -> Tensor:
    """x [M, D], rows of any stride -> [M, D]."""
    return _activate(x, None, kind, run)


def gated(gate: Tensor, up: Tensor, *, kind: str, run: Run = with_triton) -> Tensor:
    """act(gate) * up, both [M, D], rows of any stride: two halves of one product will do."""
    return _activate(gate, up, kind, run)


def activation_reference(x: Tensor, *, kind: str) -> Tensor:
    """The same in torch."""
    check(x, None, kind)
    return ACTIVATIONS[kind](x.float()).to(x.dtype)


def gated_reference(gate: Tensor, up: Tensor, *, kind: str) -> Tensor:
    """The same in torch."""
    check(gate, up, kind)
    return (ACTIVATIONS[kind](gate.float()) * up.float()).to(gate.dtype)


def check(x: Tensor, up: Tensor | None, kind: str) -> None:
    """TpvcError for tensors that do not belong together, or a kind that nobody knows."""
    if kind not in ACTIVATIONS:
        raise TpvcError(f"the activation is '{kind}'; expected one of {', '.join(ACTIVATIONS)}")
    for t in (x,) if up is None else (x, up):
        if t.dtype not in DTYPES or t.ndim != 2 or t.stride(1) != 1:
            found = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise TpvcError(f"the values to activate are {found}; expected rows of numbers in 16 or 32 bits")
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype):
        raise TpvcError(f"gate is {list(x.shape)} and up {list(up.shape)}; expected one shape and one dtype")


def _activate(x: Tensor, up: Tensor | None, kind: str, run: Run) -> Tensor:
    check(x, up, kind)
    rows, width = x.shape
    out = x.new_empty(rows, width)
    up_stride = 0 if up is None else up.stride(0)
    run(
        Launch(
            "activation:activate",
            (rows, -(-width // BLOCK), 1),
            (x, up, out, x.stride(0), up_stride, width),
            {"KIND": kind, "BLOCK": BLOCK},
        )
    )
    return out


@jit
def tanh(x):
    """In float32, from a sigmoid: off by about 2^-23 of 1, whatever x is."""
    return 2 * tl.sigmoid(2 * x) - 1


@jit
def activate(x, up, out, stride, up_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK features of row program_id(0)."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = j < width
    a = tl.load(x + row * stride + j, mask=real, other=0).to(tl.float32)
    if KIND == "silu":
        y = a * tl.sigmoid(a)
    elif KIND == "relu":
        y = tl.maximum(a, 0)
    elif KIND == "gelu":
        y = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    else:
        y = 0.5 * a * (1 + tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))
    if up is not None:
        y *= tl.load(up + row * up_stride + j, mask=real, other=0).to(tl.float32)
    tl.store(out + row * width + j, y.to(out.dtype.element_ty), mask=real)
