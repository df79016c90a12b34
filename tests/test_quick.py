"""Quick linears: the same products with less precision, their gradients too, and nothing else."""

import pytest
import torch

from tpvc.compiler import frontends, interpret, quick
from tpvc.compiler.ops import OPS
from tpvc.compiler.quick import QUICK, quick_linear


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_a_linear_up_to_bfloat16(bias, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=draw) for s in ((2, 5, 96), (64, 96), (64,)))
    g = torch.randn(2, 5, 64, generator=draw)
    monkeypatch.setattr(quick, "has_units", lambda device: True)
    given = [t.clone().requires_grad_() for t in ((x, w, b) if bias else (x, w))]
    exact = [t.clone().requires_grad_() for t in ((x, w, b) if bias else (x, w))]
    found = quick_linear(given[0], weight=given[1], bias=given[2] if bias else None)
    wanted = OPS["linear"].compute(exact[0], weight=exact[1], bias=exact[2] if bias else None)
    found.backward(g)
    wanted.backward(g)
    # both factors rounded to 8 bits: every product is off by at most 2^-8 of its size; the sum once more by 2^-9
    sizes = (x.abs() @ w.abs().T, g.abs() @ w.abs(), g.flatten(0, 1).abs().T @ x.flatten(0, 1).abs())
    assert ((found - wanted).abs() <= 1.51 * 2**-8 * sizes[0]).all()
    for mine, theirs, size in zip(given[:2], exact[:2], sizes[1:], strict=True):
        assert ((mine.grad - theirs.grad).abs() <= 1.51 * 2**-8 * size).all()
    if bias:
        # sums of 10 numbers in two orders: 9 roundings of at most 2^-24 of the sum of sizes
        assert ((given[2].grad - exact[2].grad).abs() <= 2 * 9 * 2**-24 * g.flatten(0, 1).abs().sum(0)).all()


def test_without_units_a_linear_is_exact(monkeypatch):
    monkeypatch.setattr(quick, "has_units", lambda device: False)
    x, w = torch.randn(5, 96), torch.randn(64, 96)
    assert torch.equal(quick_linear(x, weight=w), OPS["linear"].compute(x, weight=w))


def test_only_linears_are_quick(tiny_llama):
    assert {name for name in OPS if QUICK[name] is not OPS[name]} == {"linear"}
    program = frontends.load(tiny_llama)
    ids = torch.tensor([[5, 9, 200, 7]])
    values = {"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "positions": torch.arange(4)[None]}
    weight = interpret.in_memory(program)
    with torch.no_grad():
        short = interpret.run(program.nodes, values, weight, ops=QUICK)
        exact = interpret.run(program.nodes, values, weight)
    # 15 products, each off by at most 1.5 * 2^-8 of its size
    assert (short - exact).abs().max() <= 15 * 1.5 * 2**-8 * exact.abs().max()
