"""The penalty's value and its gradient, against autograd."""

import pytest
import torch

from tpvc.compiler.tuning.log_codes import encode
from tpvc.compiler.tuning.lora_space import A, B
from tpvc.compiler.tuning.penalty import Penalty


def _penalty(problem, seed=0):
    """A random one, with the space away from its anchor."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in problem.space.params.values():
            p.copy_(torch.randn(p.shape, generator=draw))
    anchor = problem.params()
    with torch.no_grad():
        for p in problem.space.params.values():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.1)
            p.grad = torch.zeros_like(p)
    omega = {n: torch.rand(problem.space.value(n).shape, generator=draw) for n in problem.space.layers}
    alpha = {n: 0.5 + i for i, n in enumerate(problem.space.layers)}
    return Penalty(anchor, omega, alpha)


@pytest.mark.parametrize(("kind", "rank"), [("weights", 1), ("lora", 1), ("lora", 4), ("road_1", 1), ("road_2", 1)])
def test_its_gradient_is_autograds(regression, kind, rank):
    problem = regression(kind, rank)
    space, phi = problem.space, 0.3
    penalty = _penalty(problem)
    found = float(penalty.add(space, phi))
    leaves = {n: p.detach().double().requires_grad_() for n, p in space.params.items()}

    def value(params, name):
        if kind == "lora":
            return space.scale * params[name + B] @ params[name + A]
        if kind == "weights":
            return params[name]
        key, first, last = space.places[name]
        return params[key][first:last]

    held = {n: t.double() for n, t in penalty.anchor.items()}
    total = sum(
        penalty.alpha[n] * (penalty.omega[n].double() * (value(leaves, n) - value(held, n)).square()).sum()
        for n in space.layers
    )
    (phi * total).backward()
    # U - U* is rounded to 2^-24 of U, and sums over at most 32 terms to 32 of these
    assert found == pytest.approx(float(total.detach()), rel=32 * 2**-20)
    for name, p in space.params.items():
        wanted = leaves[name].grad
        assert float((p.grad - wanted).abs().max()) <= 32 * 2**-20 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", ["weights", "lora", "road_1"])
def test_it_is_nothing_at_the_anchor_and_more_elsewhere(regression, kind):
    problem = regression(kind)
    penalty = _penalty(problem)
    assert float(penalty.add(problem.space, 1.0)) > 0
    with torch.no_grad():
        for name, p in problem.space.params.items():
            p.copy_(penalty.anchor[name])
            p.grad.zero_()
    assert float(penalty.add(problem.space, 1.0)) == 0
    assert not any(p.grad.any() for p in problem.space.params.values())


def test_what_is_not_protected_does_not_enter(tiny_program):
    from tpvc.compiler.tuning.space import make_space

    space = make_space(tiny_program, "weights", "all", 1, 0)
    penalty = Penalty({n: p.detach().clone() for n, p in space.params.items()})
    with torch.no_grad():
        for p in space.params.values():
            p.grad = torch.zeros_like(p)
        for name, p in space.params.items():
            if name not in space.layers:
                p.add_(1.0)
    assert float(penalty.add(space, 1.0)) == 0
    assert not any(p.grad.any() for p in space.params.values())


def test_codes_are_decoded(regression):
    problem = regression("weights")
    penalty = _penalty(problem)
    coded = {n: encode(o) for n, o in penalty.omega.items()}
    decoded = Penalty(penalty.anchor, {n: c.dense for n, c in coded.items()}, penalty.alpha)
    assert Penalty(penalty.anchor, coded, penalty.alpha).add(problem.space, 0.1) == decoded.add(problem.space, 0.1)
