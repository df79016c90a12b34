"""Factors: step 0 is rounding to nearest whatever the form of S2, and a low-rank S2 has the gradient of its product."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler.program import Grid
from tpvc.compiler.store import BlockStore
from tpvc.passes.factors import Factors
from tpvc.passes.fake_round import FakeRound
from tpvc.passes.flexround import RECIPES, FlexRound
from tpvc.passes.grid import min_max, on_grid

GRID = Grid(3, 16, False)
TOP = 2**GRID.bits - 1


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [0, 0.25, 1.0])
def test_a_start_rounds_to_nearest(weight, rank):
    span = min_max(weight, GRID)
    factors, nearest = Factors.start(weight, span, GRID, rank), on_grid(weight, span, GRID, torch.float32)
    assert torch.equal(factors.rounded(TOP, torch.float32), nearest.dequantize())
    frozen = factors.frozen(GRID, torch.float32)
    assert torch.equal(frozen.codes, nearest.codes) and torch.equal(frozen.scale, nearest.scale)


def test_low_rank_factors_have_the_share_of_the_shorter_side_and_move_with_the_product(weight):
    factors = Factors.start(weight, min_max(weight, GRID), GRID, 0.25)
    left, right, row = factors.s2
    assert (left.shape, right.shape, row.shape) == ((24, 6), (6, 64), (1, 64))
    with torch.no_grad():
        left.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        row.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    whole = (left @ right + row).detach().view(24, 4, 16).requires_grad_()
    wanted = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    (factors.rounded(TOP, torch.float32) * wanted).sum().backward()
    args = factors.weight, factors.log_scale.detach(), whole, factors.log_s3.detach(), factors.span, TOP, torch.float32
    (FakeRound.apply(*args).flatten(1) * wanted).sum().backward()
    flat = whole.grad.flatten(1)
    assert torch.allclose(left.grad, flat @ right.T.detach(), rtol=1e-5, atol=64 * 2**-23 * float(flat.abs().max()))
    assert torch.allclose(row.grad, flat.sum(0, keepdim=True), rtol=1e-5, atol=24 * 2**-23 * float(flat.abs().max()))


def test_learning_with_low_rank_improves_every_block(small_llama, tmp_path):
    recipe = replace(RECIPES["lrq"], steps=60, held_out=4)
    windows = torch.randint(3, 96, (96, 16), generator=torch.Generator().manual_seed(1))
    store = BlockStore.open(tmp_path, {})
    FlexRound(GRID, recipe, windows, store)(small_llama)
    for index in range(small_llama.blocks):
        record = store.finished(index)[1]
        assert record["error"] < record["error_rtn"] and any(line["flips"] > 0 for line in record["linears"])
