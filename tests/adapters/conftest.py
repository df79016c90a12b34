"""What RoAd's tests compare with: the definition, one 2 x 2 block at a time, and rotations of random numbers."""

import math

import pytest
import torch

from tpvc.compiler.adapters.road import STORED, Rotation


@pytest.fixture(scope="session")
def dense():
    """(rotation) -> R, float64 [n, n], from Eq. 3 and the layout of PEFT's vectors; no code is shared with road.py."""

    def build(rotation):
        g, n = rotation.group, rotation.features
        theta, alpha = rotation.theta.double().tolist(), rotation.alpha.double().tolist()
        matrix = torch.zeros(n, n, dtype=torch.float64)
        for first in range(0, n, g):
            for j in range(g // 2):
                lo, hi = first + j, first + j + g // 2
                where = {
                    "road_1": [first // 2 + j] * 4,
                    "road_2": [lo, lo, hi, hi],
                    "road_4": [first * 2 + k for k in (j, g + j, g + g // 2 + j, g // 2 + j)],
                }[rotation.variant]
                a11, a12, a21, a22 = (alpha[i] for i in where)
                t11, t12, t21, t22 = (theta[i] for i in where)
                matrix[lo, lo], matrix[lo, hi] = a11 * math.cos(t11), -a12 * math.sin(t12)
                matrix[hi, lo], matrix[hi, hi] = a21 * math.sin(t21), a22 * math.cos(t22)
        return matrix

    return build


@pytest.fixture(scope="session")
def drawn():
    """(variant, group, features, seed=0, dtype) -> a rotation far from the identity, as PEFT draws one for tests."""

    def draw(variant, group, features, seed=0, dtype=torch.float32):
        generator, m = torch.Generator().manual_seed(seed), int(features * STORED[variant])
        theta, alpha = (torch.randn(m, generator=generator, dtype=dtype) * 0.5 for _ in range(2))
        return Rotation(variant, group, theta, alpha + 1)

    return draw
