"""RMS norm and layer norm, alone or after a residual is added.

    s = x + residual, rounded to x's dtype
    RMS norm     s / sqrt(mean(s^2) + eps) * w                   w is weight + 1 where `plus_one` (Gemma)
    layer norm   (s - mean(s)) / sqrt(var(s) + eps) * w + bias

A weight of `width` entries norms every run of `width` features by itself: all features, or each head (Qwen3). A program
holds one run of one row in registers, float32. Meaning: `compiler.ops.rms_norm`, `layer_norm` and `add`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    plus_one: bool = False,
    run: Run = with_triton,
) -> tuple[Tensor, Tensor]:
    """x [M, D], rows of any stride, and residual [M, D] -> the norm [M, D] and the sum [M, D], which is x itself where
    there is no residual. weight [D], or [d] for runs of d features."""
    return _norm(x, weight, None, eps, residual, {"CENTRED": False, "PLUS_ONE": plus_one}, run)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    *,
    run: Run = with_triton,
) -> tuple[Tensor, Tensor]:
    """Likewise; bias has the shape of weight."""
    return _norm(x, weight, bias, eps, residual, {"CENTRED": True, "PLUS_ONE": False}, run)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    check(x, weight, None, residual)
    stream = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    runs = stream.float().unflatten(-1, (-1, len(weight)))
    normed = runs * torch.rsqrt(runs.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.float() + plus_one)).flatten(-2).to(x.dtype), stream


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    check(x, weight, bias, residual)
    stream = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    runs = stream.float().unflatten(-1, (-1, len(weight)))
    centred = runs - runs.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed if bias is None else normed + bias.float()).flatten(-2).to(x.dtype), stream


def check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """TpvcError for tensors that do not belong together."""
    if x.dtype not in DTYPES or x.ndim != 2 or x.stride(1) != 1:
        kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise TpvcError(f"the activations to norm are {kind}; expected rows of numbers in 16 or 32 bits")
    if weight.ndim != 1 or x.shape[1] % len(weight):
        raise TpvcError(
            f"the norm's weight has shape {list(weight.shape)}; expected one dimension that divides {x.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape:
        raise TpvcError(f"the norm's bias has shape {list(bias.shape)}; expected that of its weight, {len(weight)}")
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous()
    ):
        raise TpvcError(f"the residual is {list(residual.shape)}; expected contiguous {list(x.shape)} of x's dtype")


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    form: dict[str, bool],
    run: Run,
) -> tuple[Tensor, Tensor]:
    check(x, weight, bias, residual)
    rows, features = x.shape
    width = len(weight)
    out = x.new_empty(rows, features)
    stream = None if residual is None else torch.empty_like(out)
    block = 1 << (width - 1).bit_length()
    run(
        Launch(
            "norm:normalise",
            (rows, features // width, 1),
            (x, residual, weight, bias, out, stream, x.stride(0), features, float(eps)),
            {**form, "WIDTH": width, "BLOCK": block},
            warps=min(max(block // 512, 1), 16),
        )
    )
    return out, x if stream is None else stream


@jit
def normalise(
    x,
    residual,
    weight,
    bias,
    out,
    stream,
    stride,
    features,
    eps,
    CENTRED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Run program_id(1) of row program_id(0)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * WIDTH
    j = tl.arange(0, BLOCK)
    real = j < WIDTH
    at = row * features + first + j
    s = tl.load(x + row * stride + first + j, mask=real, other=0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + at, mask=real, other=0).to(tl.float32)
        rounded = s.to(stream.dtype.element_ty)
        tl.store(stream + at, rounded, mask=real)
        s = rounded.to(tl.float32)
    if CENTRED:
        s = tl.where(real, s - tl.sum(s, 0) / WIDTH, 0)
    w = tl.load(weight + j, mask=real, other=0).to(tl.float32)
    if PLUS_ONE:
        w += 1
    y = s * tl.rsqrt(tl.sum(s * s, 0) / WIDTH + eps) * w
    if bias is not None:
        y += tl.load(bias + j, mask=real, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=real)
