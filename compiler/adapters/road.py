"""RoAd, 2D rotary adaptation (Liao and Monz, NeurIPS 2024, arXiv 2409.00119): its algebra, and nothing else.

An adapted linear yields `z = R h` instead of `h = W x + b`, R block-diagonal with 2 x 2 blocks over pairs of outputs.
Inside every run of G = `group` outputs, output j is paired with j + G/2 (PEFT's half-group pairing; G = 2 is the
paper's adjacent one). With (lo, hi) the members of a pair, every variant is two vectors C and S of length n (Eq. 3, 4):

    z_lo = C_lo h_lo - S_lo h_hi            z = C * h + S * rot(h),    rot(h)_lo = -h_hi,  rot(h)_hi = h_lo
    z_hi = C_hi h_hi + S_hi h_lo

    road_1   one alpha, one theta a pair     C = alpha cos theta, S = alpha sin theta, the same for lo and hi
    road_2   one of each an output           likewise, each output its own
    road_4   all four entries their own      C = a cos t from one set, S = a sin t from another

theta 0 and alpha 1 are the identity. Everything is kept and multiplied in float32, and rounded once, to the dtype of h.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError

STORED = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""Numbers in theta, and as many in alpha, for every output of a linear."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What an adapter may be called: its name becomes that of a folder and of files."""

ROWS_AT_ONCE = 64
"""Rows folded together: bounds the working memory of a large matrix."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """The adapter of one linear: `theta` (radians) and `alpha`, float32 [m] in PEFT's order, m = n/2, n or 2n.

    road_1: pair after pair; road_2: output after output; road_4: for every group its G numbers for C, then G for S.
    """

    variant: str
    group: int
    theta: Tensor
    alpha: Tensor

    @property
    def features(self) -> int:
        """n, the outputs of the linear."""
        return int(len(self.theta) / STORED[self.variant])

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """C and S, float32 [n]."""
        return vectors(self.variant, self.group, self.theta, self.alpha)


@dataclass(frozen=True, eq=False)
class Road:
    """An adapter: a rotation for some linears of a model, by the name of the linear node.

    origin  where it came from, for the manifest: {"directory", "sha256", ...}
    """

    name: str
    rotations: Mapping[str, Rotation]
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainables(self) -> int:
        """theta and alpha of every linear, as publications count them: n, 2n or 4n a linear."""
        return sum(len(r.theta) + len(r.alpha) for r in self.rotations.values())

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"name": self.name, "trainables": self.trainables, **self.origin}


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise TpvcError(
            f"an adapter is called '{name}'; expected a name of letters, digits, dots, dashes and underscores,"
            " give one as in NAME=DIR"
        )


def identity(variant: str, group: int, features: int) -> Rotation:
    """theta 0, alpha 1: z = h. TpvcError for an unknown variant or a group that does not fit."""
    check_layout(variant, group, features)
    m = int(features * STORED[variant])
    return Rotation(variant, group, torch.zeros(m), torch.ones(m))


def check_layout(variant: str, group: int, features: int, where: str = "the linear") -> None:
    """Refuse a variant that does not exist, and a group that is odd or does not divide the outputs."""
    if variant not in STORED:
        raise TpvcError(f"RoAd variant is '{variant}'; expected one of {', '.join(STORED)}")
    if group < 2 or group % 2:
        raise TpvcError(f"RoAd group size is {group}; expected an even number, at least 2")
    if features % group:
        raise TpvcError(
            f"RoAd group size {group} does not divide the {features} outputs of {where};"
            f" the largest that fits is {gcd(features, group) if gcd(features, group) % 2 == 0 else 'none'}"
        )


def vectors(variant: str, group: int, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """C and S [n] of theta and alpha [m]; differentiable."""
    cosine, sine = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_1":
        return tuple(v.view(-1, 1, group // 2).expand(-1, 2, -1).reshape(-1) for v in (cosine, sine))
    if variant == "road_4":
        return cosine.view(-1, 2, group)[:, 0].reshape(-1), sine.view(-1, 2, group)[:, 1].reshape(-1)
    return cosine, sine


def halves(t: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(lo, hi): the first and the second members of all pairs, views [..., n / G, G / 2] of a contiguous t [..., n]."""
    pairs = t.view(*t.shape[:-1], -1, 2, group // 2)
    return pairs.select(-2, 0), pairs.select(-2, 1)


def rotate(h: Tensor, cosine: Tensor, sine: Tensor, group: int) -> Tensor:
    """`C * h + S * rot(h)` for h [..., n]; computed in the wider dtype, given back in that of h. Differentiable."""
    x = h.to(torch.promote_types(h.dtype, cosine.dtype)).contiguous()
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in (x, cosine, sine))
    return (_Rotate.apply(x, cosine, sine, group) if learning else _turned(x, cosine, sine, group)).to(h.dtype)


def _turned(h: Tensor, cosine: Tensor, sine: Tensor, group: int) -> Tensor:
    out = cosine * h
    (z_lo, z_hi), (h_lo, h_hi), (s_lo, s_hi) = (halves(t, group) for t in (out, h, sine))
    z_lo -= s_lo * h_hi
    z_hi += s_hi * h_lo
    return out


class _Rotate(torch.autograd.Function):
    """The product and its gradients written out: nothing but h is kept, and rot(h) is never made.

    dL/dh_lo = C_lo g_lo + S_hi g_hi        dL/dC = sum g h             sums over what C and S are shared by
    dL/dh_hi = C_hi g_hi - S_lo g_lo        dL/dS = sum g rot(h)
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, cosine: Tensor, sine: Tensor, group: int) -> Tensor:
        ctx.save_for_backward(h, cosine, sine)
        ctx.group = group
        return _turned(h, cosine, sine, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, cosine, sine = ctx.saved_tensors
        grad = grad.contiguous()
        (g_lo, g_hi), (h_lo, h_hi), (s_lo, s_hi) = (halves(t, ctx.group) for t in (grad, h, sine))
        d_h = d_cosine = d_sine = None
        if ctx.needs_input_grad[0]:
            d_h = cosine * grad
            d_lo, d_hi = halves(d_h, ctx.group)
            d_lo.add_(s_hi * g_hi)
            d_hi.sub_(s_lo * g_lo)
        if ctx.needs_input_grad[1]:
            d_cosine = (grad * h).sum_to_size(cosine.shape)
        if ctx.needs_input_grad[2]:
            whole = torch.empty_like(grad)
            d_lo, d_hi = halves(whole, ctx.group)
            torch.mul(g_lo, h_hi, out=d_lo).neg_()
            torch.mul(g_hi, h_lo, out=d_hi)
            d_sine = whole.sum_to_size(sine.shape)
        return d_h, d_cosine, d_sine, None


def fold_(matrix: Tensor, rotation: Rotation) -> None:
    """In place: W [n, k] becomes R W, a bias as [n, 1] R b. Any float dtype; products in float32, rounded once.

    R is never built; the working memory is a few rows.
    """
    for lo, hi, (c_lo, c_hi), (s_lo, s_hi) in _pairs(matrix, rotation):
        a, b = lo.float(), hi.float()
        low, high = c_lo * a - s_lo * b, c_hi * b + s_hi * a
        lo.copy_(low)
        hi.copy_(high)


def unfold_(matrix: Tensor, rotation: Rotation, where: str) -> None:
    """In place: the inverse of `fold_` in closed form, `det = C_lo C_hi + S_lo S_hi` a pair.

    TpvcError where `check_invertible` refuses: nothing brings such weights back.
    """
    check_invertible(rotation, where)
    for lo, hi, (c_lo, c_hi), (s_lo, s_hi) in _pairs(matrix, rotation):
        a, b, det = lo.float(), hi.float(), c_lo * c_hi + s_lo * s_hi
        low, high = (c_hi * a + s_lo * b) / det, (c_lo * b - s_hi * a) / det
        lo.copy_(low)
        hi.copy_(high)


def check_invertible(rotation: Rotation, where: str) -> None:
    """TpvcError that names the first pair where det is 0 as far as float32 can tell: the two rows of its block, of
    lengths r_lo and r_hi, are parallel within the rounding of their angles (det = r_lo r_hi sin of the angle between).
    """
    cosine, sine = rotation.vectors
    (c_lo, c_hi), (s_lo, s_hi) = halves(cosine, rotation.group), halves(sine, rotation.group)
    det, lengths = c_lo * c_hi + s_lo * s_hi, torch.hypot(c_lo, s_lo) * torch.hypot(c_hi, s_hi)
    singular = ~(det.abs() > 4 * torch.finfo(torch.float32).eps * lengths)
    if bool(singular.any()):
        group, place = singular.nonzero()[0].tolist()
        lo = group * rotation.group + place
        raise TpvcError(
            f"the rotation of '{where}' is singular at outputs {lo} and {lo + rotation.group // 2}, so that it cannot"
            " be taken out again; use the original weights"
        )


def _pairs(matrix: Tensor, rotation: Rotation) -> Iterator[tuple]:
    """(lo, hi, (C_lo, C_hi), (S_lo, S_hi)) of one lot of row pairs after the other: views [g, j, k] of a contiguous
    matrix [n, k], about ROWS_AT_ONCE rows together, and their factors [g, j, 1]."""
    half = rotation.group // 2
    rows = matrix.view(-1, 2, half, matrix.shape[1])
    factors = [tuple(h[..., None] for h in halves(v.to(matrix.device), rotation.group)) for v in rotation.vectors]
    groups, width = max(1, ROWS_AT_ONCE // rotation.group), max(1, ROWS_AT_ONCE // 2)
    for g in range(0, len(rows), groups):
        for j in range(0, half, width):
            at = (slice(g, g + groups), slice(j, j + width))
            part = rows[at[0], :, at[1]]
            yield part[:, 0], part[:, 1], *(tuple(f[at] for f in pair) for pair in factors)
