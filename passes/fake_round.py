"""Round to a grid in the forward pass, differentiate straight through it in the backward pass.

With u = W / (s1 S2 s3), q = clamp(round(u), -z, top - z), g = dL/dW_hat, and m = 1 where nothing was clamped:

    dL/dlog S2 = -m u s1 g        dL/dlog s3 = its row sums        dL/dlog s1 = sum s1 (q - m u) g

(arXiv 2306.00317, Proposition 3.1, in the log domain). One function with these written out does a third of the passes
over memory that automatic differentiation of the plain expression does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpvc.passes.grid import Range, storable


class FakeRound(torch.autograd.Function):
    """`apply(weight, log_scale, log_s2, log_s3, span, top, dtype)` -> W_hat.

    weight, log_s2  [out, groups, columns]; log_scale: shape of span.scale; log_s3 [out, 1, 1]; top = 2^bits - 1.
    The scale is rounded to the storage `dtype` (straight-through as well).
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_scale: Tensor,
        log_s2: Tensor,
        log_s3: Tensor,
        span: Range,
        top: int,
        dtype: torch.dtype,
    ) -> Tensor:
        scale = learned_scale(span, log_scale, dtype)
        code, ratio = _codes(weight, scale, span.zero, log_s2, log_s3, top)
        ctx.save_for_backward(code, ratio, scale)
        return code * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        code, ratio, scale = ctx.saved_tensors
        step = grad * scale
        d_s2 = ratio.mul_(step).neg_()
        d_s3 = d_s2.sum((1, 2), keepdim=True)
        d_scale = (step.mul_(code).add_(d_s2)).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        return None, d_scale, d_s2, d_s3, None, None, None


def learned_scale(span: Range, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s1: the starting scale times the learned factor, as it will be stored; exactly the start at factor 0."""
    return storable(span.scale * log_scale.exp(), dtype)


def learned_codes(
    weight: Tensor, span: Range, log_scale: Tensor, log_s2: Tensor, log_s3: Tensor, top: int, dtype: torch.dtype
) -> tuple[Tensor, Range]:
    """The codes relative to zero that the last forward pass used, and the grid they belong to: what is deployed."""
    scale = learned_scale(span, log_scale, dtype)
    return _codes(weight, scale, span.zero, log_s2, log_s3, top)[0], Range(scale, span.zero)


def _codes(
    weight: Tensor, scale: Tensor, zero: Tensor, log_s2: Tensor, log_s3: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """(codes relative to zero, ratio W / (s1 S2 s3) where the code was not clamped and 0 elsewhere)."""
    ratio = (log_s2 + log_s3).neg_().exp_().mul_(weight).div_(scale)
    nearest = ratio.round()
    code = torch.minimum(torch.maximum(nearest, -zero), top - zero)
    return code, ratio.mul_(code == nearest)
