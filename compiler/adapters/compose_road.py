"""New RoAd adapters from trained ones (the paper's section on composability, and the algebra of 2 x 2 blocks).

    disjoint       every pair of outputs from the one adapter that moved it; all variants, exact, in any order
    product        one adapter after the other, R_B (R_A h): alphas multiply, thetas add; road_1, whose blocks commute
    interpolate    per number, theta = sum_i w_i theta_i and alpha = exp(sum_i w_i log alpha_i); a path between adapters
                   that is a rotation all the way for road_1, and a heuristic for road_2 and road_4

A linear that only some adapters have is the identity in the others. Sums and products are taken in float64 and rounded
once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.adapters.road import STORED, Road, Rotation, identity
from tpvc.compiler.errors import TpvcError


def disjoint(name: str, roads: Sequence[Road]) -> Road:
    """Adapters that moved different pairs, as one. TpvcError where two moved the same pair, whatever they did to it."""
    variant, group, parts = _aligned(roads)
    rotations, clashes = {}, []
    for linear, rotations_of in parts.items():
        theta, alpha = by_pair(identity(variant, group, rotations_of[0].features))
        owners = torch.zeros(len(roads), len(theta), dtype=torch.bool)
        for i, rotation in enumerate(rotations_of):
            own_theta, own_alpha = by_pair(rotation)
            owners[i] = ((own_theta != 0) | (own_alpha != 1)).any(1)
            theta = torch.where(owners[i, :, None], own_theta, theta)
            alpha = torch.where(owners[i, :, None], own_alpha, alpha)
        clashes += [(linear, int(pair), owners[:, pair]) for pair in (owners.sum(0) > 1).nonzero()[:, 0]]
        rotations[linear] = from_pairs(variant, group, theta, alpha)
    if clashes:
        linear, pair, owners = clashes[0]
        names = " and ".join(f"'{road.name}'" for road, owns in zip(roads, owners, strict=True) if owns)
        lo = pair // (group // 2) * group + pair % (group // 2)
        raise TpvcError(
            f"{names} both move outputs {lo} and {lo + group // 2} of '{linear}', one of {len(clashes)} pairs that they"
            " share; expected adapters of different pairs, use product or interpolate"
        )
    return Road(name, rotations, _origin("disjoint", roads, [1.0] * len(roads), variant, group))


def product(name: str, roads: Sequence[Road]) -> Road:
    """road_1 adapters one after the other. TpvcError for other variants: their products depend on the order."""
    variant, group, parts = _aligned(roads)
    if variant != "road_1":
        raise TpvcError(
            f"'{roads[0].name}' is {variant}, whose products depend on the order of the adapters and may leave the"
            " variant; expected road_1, use disjoint or interpolate"
        )
    rotations = {
        linear: _rounded(
            linear,
            rotations_of[0],
            sum(r.theta.double() for r in rotations_of),
            math.prod(r.alpha.double() for r in rotations_of),
        )
        for linear, rotations_of in parts.items()
    }
    return Road(name, rotations, _origin("product", roads, [1.0] * len(roads), variant, group))


def interpolate(name: str, roads: Sequence[Road], weights: Sequence[float]) -> Road:
    """The weighted mean of angles and geometric mean of scales; weights need not sum to 1. One of weight 1 and others
    of weight 0 give that one back. TpvcError where a scale is not above 0 and so has no logarithm.
    """
    variant, group, parts = _aligned(roads)
    if len(weights) != len(roads) or not all(map(math.isfinite, weights)):
        told = ", ".join(f"{w:g}" for w in weights) or "none"
        raise TpvcError(f"found the weights {told} for {len(roads)} adapters; expected one finite number for each")
    for road in roads:
        for linear, rotation in road.rotations.items():
            if not bool((rotation.alpha > 0).all()):
                raise TpvcError(
                    f"'{road.name}' scales '{linear}' by {rotation.alpha.min():g}; expected scales above 0, whose"
                    " logarithms can be averaged, use disjoint or product"
                )
    rotations = {}
    for linear, rotations_of in parts.items():
        pairs = list(zip(weights, rotations_of, strict=True))
        theta = sum(w * r.theta.double() for w, r in pairs)
        alpha = sum(w * r.alpha.double().log() for w, r in pairs).exp()
        rotations[linear] = _rounded(linear, rotations_of[0], theta, alpha)
    return Road(name, rotations, _origin("interpolate", roads, [float(w) for w in weights], variant, group))


def by_pair(rotation: Rotation) -> tuple[Tensor, Tensor]:
    """theta and alpha, each [n / 2, k]: the k = 1, 2 or 4 numbers of every pair, of road_1, road_2 or road_4."""
    half, k = rotation.group // 2, int(2 * STORED[rotation.variant])
    return tuple(v.view(-1, k, half).transpose(1, 2).reshape(-1, k) for v in (rotation.theta, rotation.alpha))


def from_pairs(variant: str, group: int, theta: Tensor, alpha: Tensor) -> Rotation:
    """The inverse of `by_pair`."""
    k = int(2 * STORED[variant])
    return Rotation(variant, group, *(v.view(-1, group // 2, k).transpose(1, 2).reshape(-1) for v in (theta, alpha)))


def _aligned(roads: Sequence[Road]) -> tuple[str, int, dict[str, list[Rotation]]]:
    """(variant, group, {linear: its rotation in every adapter}), the identity where an adapter has none for it."""
    if not roads:
        raise TpvcError("no adapters were given; expected at least one to compose")
    kinds = {(r.variant, r.group): road.name for road in roads for r in road.rotations.values()}
    if len(kinds) != 1:
        told = " and ".join(f"{variant} in groups of {group} ('{name}')" for (variant, group), name in kinds.items())
        raise TpvcError(f"found {told or 'adapters without rotations'}; expected one variant and one group size")
    ((variant, group),) = kinds
    parts = {}
    for linear in dict.fromkeys(name for road in roads for name in road.rotations):
        own = [road.rotations.get(linear) for road in roads]
        sizes = sorted({r.features for r in own if r is not None})
        if len(sizes) > 1:
            raise TpvcError(
                f"the adapters have {' and '.join(map(str, sizes))} outputs for '{linear}'; expected adapters of one"
                " model"
            )
        parts[linear] = [r or identity(variant, group, sizes[0]) for r in own]
    return variant, group, parts


def _rounded(linear: str, like: Rotation, theta: Tensor, alpha: Tensor) -> Rotation:
    """Float64 numbers in float32, which must hold them."""
    theta, alpha = theta.float(), alpha.float()
    if not bool(theta.isfinite().all() and alpha.isfinite().all()):
        raise TpvcError(
            f"the rotation of '{linear}' leaves float32; expected finite angles and scales, use less of them"
        )
    return Rotation(like.variant, like.group, theta, alpha)


def _origin(kind: str, roads: Sequence[Road], weights: Sequence[float], variant: str, group: int) -> dict[str, Any]:
    return {
        "composed": kind,
        "of": [road.name for road in roads],
        "weights": list(weights),
        "variant": variant,
        "group": group,
    }
