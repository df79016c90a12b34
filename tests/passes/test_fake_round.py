"""FlexRound's forward and its gradients: the identities of arXiv 2306.00317 in the log domain."""

import pytest
import torch

from tpvc.compiler.program import Grid
from tpvc.passes.fake_round import FakeRound, learned_codes
from tpvc.passes.grid import Range, grouped, min_max, on_grid

GRIDS = [Grid(b, g, s) for b in (2, 4) for g in (8, -1, 0) for s in (True, False)]


def case(grid, dtype=torch.float64, spread=0.0, seed=0):
    """(weight [12, g, c], span, log_scale, log_s2, log_s3) with factors of standard deviation `spread`."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 24, generator=draw) * 0.1
    span = min_max(weight, grid)
    span = Range(span.scale.to(dtype), span.zero.to(dtype))
    view = grouped(weight, grid).to(dtype)

    def factor(shape):
        return (torch.randn(shape, generator=draw, dtype=dtype) * spread).requires_grad_()

    return view, span, factor(span.scale.shape), factor(view.shape), factor((12, 1, 1))


def plain(weight, log_scale, log_s2, log_s3, span, top):
    """The same by automatic differentiation: straight-through rounding, clamp with both bounds inside."""
    scale = span.scale * log_scale.exp()
    ratio = weight / (scale * (log_s2 + log_s3).exp())
    nearest = ratio + (ratio.round() - ratio).detach()
    inside = (nearest.detach() >= -span.zero) & (nearest.detach() <= top - span.zero)
    clamped = torch.minimum(torch.maximum(nearest.detach(), -span.zero), top - span.zero)
    return torch.where(inside, nearest, clamped) * scale


@pytest.mark.parametrize("spread", [0.0, 0.6])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_equal_automatic_differentiation(grid, spread):
    view, span, *factors = case(grid, spread=spread)
    top = 2**grid.bits - 1
    seed = torch.randn(view.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # float64 storage would be rounded to float32 scales; float64 keeps them, so both sides compute the same numbers
    ours = FakeRound.apply(view, *factors, span, top, torch.float64)
    wanted = plain(view, *factors, span, top)
    # storable() passes through float32: compare to its resolution, 2^-24, over sums of at most 288 terms of size < 10
    assert torch.allclose(ours, wanted, rtol=2**-22, atol=0)
    found = torch.autograd.grad((ours * seed).sum(), factors)
    expected = torch.autograd.grad((wanted * seed).sum(), factors)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=2**-20, atol=288 * 2**-22)
    if spread:
        code, _ = learned_codes(view, span, *[f.detach() for f in factors], top, torch.float64)
        assert bool(((code == -span.zero) | (code == top - span.zero)).any()), "the case must hold clamped entries"


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_start_is_round_to_nearest_bit_for_bit(grid):
    view, span, *factors = case(grid, torch.float32)
    start = FakeRound.apply(view, *factors, span, 2**grid.bits - 1, torch.float32)
    nearest = on_grid(view.flatten(1), span, grid, torch.float32)
    assert torch.equal(start.flatten(1), nearest.dequantize())


def test_row_gradient_is_the_sum_of_the_weights_gradients():
    view, span, *factors = case(Grid(3, -1, False), spread=0.4)
    out = FakeRound.apply(view, *factors, span, 7, torch.float64)
    _, s2, s3 = torch.autograd.grad(out.square().sum(), factors)
    assert torch.allclose(s2.sum((1, 2), keepdim=True), s3, rtol=1e-12, atol=0)


def test_shared_scale_gradient_is_the_sum_of_the_rows():
    """With one scale for all rows, the per-tensor gradient is the sum of the per-channel ones."""
    view, span, scale, s2, s3 = case(Grid(3, 0, False), spread=0.3)
    rows = Range(span.scale.expand(12, 1, 1).clone(), span.zero.expand(12, 1, 1).clone())
    row_scale = scale.detach().expand(12, 1, 1).clone().requires_grad_()
    tensor = torch.autograd.grad(FakeRound.apply(view, scale, s2, s3, span, 7, torch.float64).square().sum(), scale)[0]
    channel = torch.autograd.grad(
        FakeRound.apply(view, row_scale, s2, s3, rows, 7, torch.float64).square().sum(), row_scale
    )
    assert torch.allclose(tensor.sum(), channel[0].sum(), rtol=1e-12, atol=0)


def test_gradient_grows_with_the_weight():
    """Proposition 3.1: at S' = 1 and equal g, gradients are to each other as the weights are."""
    view, span, *factors = case(Grid(8, -1, False))
    out = FakeRound.apply(view, *factors, span, 255, torch.float64)
    s2 = torch.autograd.grad(out.sum(), factors)[1]
    code, _ = learned_codes(view, span, *[f.detach() for f in factors], 255, torch.float64)
    inside = (code > -span.zero) & (code < 255 - span.zero)
    ratio = (s2 / -view)[inside]
    assert torch.allclose(ratio, torch.ones_like(ratio), rtol=2**-22, atol=0)


def test_gauge_moving_a_constant_from_s2_to_s3_changes_nothing():
    view, span, scale, s2, s3 = case(Grid(4, 8, False), spread=0.3)
    one = FakeRound.apply(view, scale, s2, s3, span, 15, torch.float64)
    two = FakeRound.apply(view, scale, s2 - 0.25, s3 + 0.25, span, 15, torch.float64)
    assert torch.equal(one, two)


def test_a_factor_moves_a_weight_several_steps_and_it_stays_on_the_grid():
    grid = Grid(4, -1, True)
    weight = torch.tensor([[0.2, 1.0, -1.0, 0.0]])
    span = min_max(weight, grid)
    s2 = torch.zeros(1, 1, 4)
    before, _ = learned_codes(weight[:, None], span, torch.zeros(1, 1, 1), s2, torch.zeros(1, 1, 1), 15, torch.float32)
    s2[0, 0, 0] = torch.log(torch.tensor(1 / 3.5))
    after, on = learned_codes(weight[:, None], span, torch.zeros(1, 1, 1), s2, torch.zeros(1, 1, 1), 15, torch.float32)
    assert after[0, 0, 0] - before[0, 0, 0] >= 3
    assert torch.equal(after, after.round()) and torch.equal(on.scale, span.scale)
    assert after[0, 0, 3] == 0, "a zero weight stays zero whatever its factor"


def test_frozen_codes_are_the_last_forward_pass():
    grid = Grid(3, 8, False)
    view, span, *factors = case(grid, torch.float32, spread=0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        forward = FakeRound.apply(view, *factors, span, 7, dtype)
        code, on = learned_codes(view, span, *[f.detach() for f in factors], 7, dtype)
        assert torch.equal(forward.detach(), code * on.scale)
        stored = (code + on.zero).to(torch.uint8)
        assert int(stored.max()) <= 7
        assert torch.equal(on.scale.to(dtype).float(), on.scale)
