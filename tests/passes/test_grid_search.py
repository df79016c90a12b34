"""The searched grid is never worse than min/max by the measure it minimises, and finds a known optimum."""

import pytest
import torch

from tpvc.compiler.program import Grid
from tpvc.passes.grid import min_max, on_grid
from tpvc.passes.grid_search import search


@pytest.mark.parametrize(
    "grid", [Grid(b, g, s) for b in (2, 3, 4) for g in (16, -1, 0) for s in (True, False)], ids=str
)
def test_weighted_error_is_at_most_that_of_min_max(grid):
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(16, 64, generator=draw)
    h = torch.rand(64, generator=draw) ** 4

    def error(span):
        return float(((on_grid(w, span, grid, torch.float32).dequantize() - w).square() * h).sum())

    assert error(search(w, h, grid)) < error(min_max(w, grid))


def test_an_outlier_without_importance_is_cut():
    w = torch.linspace(-1, 1, 64)[None].repeat(2, 1)
    w[0, 5] = 3.9
    h = torch.ones(64)
    h[5] = 0
    grid = Grid(4, -1, False)
    found = search(w, h, grid)
    assert found.scale[0] < 0.6 * min_max(w, grid).scale[0]


def test_symmetric_search_may_turn_the_scale_negative():
    """A row whose largest weight is positive: only a negative scale puts it on code 0, the far end of the range."""
    w = torch.tensor([[1.0, -0.25, 0.25, 0.5, -0.5, 0.75, -0.75, 0.0] * 2])
    found = search(w, torch.ones(16), Grid(3, -1, True))
    assert float(found.scale) == -0.25
    assert torch.equal(on_grid(w, found, Grid(3, -1, True), torch.float32).dequantize(), w)
