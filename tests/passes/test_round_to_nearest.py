"""Round-to-nearest: the grid formulas, ranges, degenerate rows, and the refusals."""

import pytest
import torch

from tpvc.compiler.program import Grid
from tpvc.passes.grid import min_max, on_grid, storable
from tpvc.passes.round_to_nearest import quantize

GRIDS = [Grid(b, g, s) for b in (2, 3, 4, 5, 6, 7, 8) for g in (16, -1, 0) for s in (True, False)]


def weights(seed=0, shape=(24, 48)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_weight_is_within_half_a_step_of_its_code_unless_clamped(grid):
    w = weights()
    q = quantize(w, grid)
    assert q.codes.dtype == torch.uint8 and int(q.codes.max()) <= 2**grid.bits - 1
    step = q.scale if grid.group == 0 else q.scale.repeat_interleave(w.shape[1] // q.scale.shape[1], 1)
    error = (q.dequantize() - w).abs()
    inside = (q.codes > 0) & (q.codes < 2**grid.bits - 1)
    assert bool((error <= step / 2 * (1 + 1e-5))[inside].all())
    # the extremes: an asymmetric range is stretched by at most half a step when its zero point is rounded,
    # a symmetric one cuts the positive extreme by half a step
    assert bool((error <= step * (1 + 1e-5)).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_stays_exactly_zero(grid):
    w = weights()
    w[:, ::5] = 0
    assert bool((quantize(w, grid).dequantize()[:, ::5] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_rows_stay_finite(symmetric):
    w = weights()
    w[0] = 0
    w[1] = 0.7
    w[2] = w[2].abs() + 0.1
    w[3] = -w[3].abs() - 0.1
    w[4] = 1e-30
    for group in (16, -1):
        grid = Grid(4, group, symmetric)
        span = min_max(w, grid)
        assert bool((span.scale.abs() >= 1e-8).all())
        q = on_grid(w, span, grid, torch.float32)
        assert bool(q.dequantize().isfinite().all())
        assert bool((q.dequantize()[0] == 0).all())
        # one-sided rows: the range includes 0, so the constant row is within half a step (symmetric: cut)
        assert float((q.dequantize()[1] - 0.7).abs().max()) <= 0.7 * 2 / 15 / 2 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_exact_in_their_storage_dtype(dtype):
    q = quantize(weights(), Grid(4, 16, False), dtype)
    assert torch.equal(q.scale.to(dtype).float(), q.scale)
    assert storable(torch.zeros(3), dtype).min() > 0
    assert storable(torch.tensor([-0.5]), dtype).item() == -0.5


def test_rows_in_chunks_equal_rows_at_once(monkeypatch):
    w, grid = weights(), Grid(3, 16, False)
    whole = quantize(w, grid)
    monkeypatch.setattr("tpvc.passes.round_to_nearest.ROWS_AT_ONCE", 5 * w.shape[1])
    parts = quantize(w, grid)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero, parts.zero)


def test_small_scales_of_float16_checkpoints_are_not_coarsened():
    """Rows whose scale is below float16's normal numbers keep a grid within a few percent of the one they need."""
    w = weights() * 0.002
    half, whole = quantize(w, Grid(8, -1, False), torch.float16), quantize(w, Grid(8, -1, False))
    assert float(whole.scale.max()) < torch.finfo(torch.float16).tiny
    assert float(((half.scale - whole.scale) / whole.scale).abs().max()) < 2**-5
