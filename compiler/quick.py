"""Faster linears where their precision is not what counts: multiplied in bfloat16, added in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.ops import OPS, Op


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` and its gradients: both factors of every product and the product in bfloat16, all else in
    float32. Written out, as what torch would keep for the backward pass are the float32 factors too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        short = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(short[0] if ctx.needs_input_grad[1] else None, short[1])
        product = torch.nn.functional.linear(*short).float()
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, short = ctx.needs_input_grad, grad.bfloat16()
        d_x = (short @ weight).float() if needed[0] else None
        d_weight = (short.flatten(0, -2).T @ x.flatten(0, -2)).float() if needed[1] else None
        return d_x, d_weight, grad.flatten(0, -2).sum(0) if needed[2] else None


@cache
def has_units(device: str) -> bool:
    """Does a device of this type ("cpu", "cuda") multiply bfloat16 by itself? Where it does not it takes longer."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.9
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def quick_linear(x: Tensor, *, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear whose products are off by at most 2^-8 of their size plus 2^-9 of the sum; an exact one where the
    processor has no units for that."""
    if not has_units(x.device.type):
        return torch.nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def quick_weight(weight: Tensor) -> Tensor:
    """A weight that does not move as `quick_linear` multiplies by it, for those who call it with the same one again."""
    return weight.bfloat16() if has_units(weight.device.type) else weight


SHORT = 4
"""Bits of a weight up to which its own rounding errors are far larger than those of quick products."""
QUICK: dict[str, Op] = OPS | {"linear": replace(OPS["linear"], compute=quick_linear)}
"""The op table with quick linears and exact attention, which is no quicker in bfloat16 (4 windows of 256 tokens, there
and back: 33 ms in float32, 37 in bfloat16)."""


def ops_for(bits: Iterable[int]) -> Mapping[str, Op]:
    """The op table of blocks whose weights are rounded to so many bits: quick where one of them is SHORT."""
    return QUICK if min(bits, default=SHORT + 1) <= SHORT else OPS
