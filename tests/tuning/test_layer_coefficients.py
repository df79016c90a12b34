"""Coefficients of layers: means, sums, and when one layer gets everything."""

import math

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning.layer_coefficients import coefficients

ALIKE = torch.full((8,), 100)


@pytest.mark.parametrize("low", [0.8, 8.0, 80.0, 1e6])
def test_the_default_is_scale_free_and_of_mean_one(low):
    """Norms that rise to 1.875 of the lowest give the same coefficients, whatever that is; none takes all."""
    norms = torch.linspace(low, 1.875 * low, 8, dtype=torch.float64)
    found = coefficients("normalised", norms, ALIKE)
    powers = [math.exp((1 + i / 8) / (1 + 7 / 16)) for i in range(8)]
    assert found.tolist() == pytest.approx([8 * p / sum(powers) for p in powers], rel=2**-22)
    assert 0.7 < float(found.min()) < float(found.max()) < 1.4


@pytest.mark.parametrize("step", [10.0, 1.0, 0.1])
def test_the_raw_one_is_one_hot_as_soon_as_norms_differ(step):
    """Of norms 8 step, 9 step, ... 15 step the largest gets 1 / (1 + e^-step + e^-2 step + ...)."""
    found = coefficients("raw", torch.arange(8, 16) * step, ALIKE)
    assert float(found.sum()) == pytest.approx(1, abs=8 * 2**-23)
    assert float(found.max()) == pytest.approx(1 / sum(math.exp(-step * k) for k in range(8)), rel=2**-20)
    assert (float(found.max()) > 0.9999) == (step == 10)


@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_they_are_finite_and_equal_where_norms_are(kind):
    wild = coefficients(kind, torch.tensor([1e6, 1e-6, 0.0, 3.0]), torch.tensor([1, 9, 9, 9]))
    assert bool(wild.isfinite().all()) and bool((wild >= 0).all())
    alike = coefficients(kind, torch.full((5,), 7.3), torch.full((5,), 4))
    assert torch.equal(alike, alike[:1].expand(5))


def test_a_layer_is_not_important_for_being_large():
    """Twice as many elements of the same importance have a norm sqrt(2) times as large."""
    found = coefficients("normalised", torch.tensor([1.0, 2.0**0.5]), torch.tensor([100, 200]))
    assert found.tolist() == pytest.approx([1, 1], abs=2**-22)


def test_an_unknown_kind():
    with pytest.raises(TpvcError, match="expected one of normalised, raw"):
        coefficients("max", torch.ones(2), torch.ones(2))
