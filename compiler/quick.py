"""Faster matrix products where their precision is not what counts: multiplied in bfloat16, added in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.ops import OPS, Op


@contextmanager
def quick_matmul(wanted: bool) -> Iterator[None]:
    """Let float32 matrix products multiply in bfloat16 and add in float32 where the processor has units for it.

    The products' relative error of 2^-9 is far below the error that learning at 4 bits and less repairs, and no more
    than that of training in bfloat16; elsewhere it is not wanted, and nothing is changed.
    """
    before = torch.backends.mkldnn.matmul.fp32_precision
    if wanted:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` and its gradients, each product a quick one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        with quick_matmul(True):
            return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, rows = ctx.needs_input_grad, grad.flatten(0, -2)
        with quick_matmul(True):
            d_x = grad @ weight if needed[0] else None
            d_weight = rows.T @ x.flatten(0, -2) if needed[1] else None
        return d_x, d_weight, rows.sum(0) if needed[2] else None


def quick_linear(x: Tensor, *, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(x, weight, bias)


QUICK: dict[str, Op] = OPS | {"linear": replace(OPS["linear"], compute=quick_linear)}
"""The op table with quick linears and exact attention: over short rows, whose scores are tiny matrices, quick products
take six times as long (8 rows of 48 tokens, forward and backward: 14.6 ms against 2.5)."""
