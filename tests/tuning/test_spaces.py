"""What is trained and what is protected: the same importance whatever the factors, and no dense update too many."""

import gc
import weakref

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning.importance import importance
from tpvc.compiler.tuning.lora_space import A, B
from tpvc.compiler.tuning.penalty import Penalty
from tpvc.compiler.tuning.space import make_space


def test_the_effective_space_and_the_factors(regression):
    """sum omega_effective = sum omega_factors - s <G, dB dA>, step by step, in float64 but for the gradients."""
    problem = regression("lora")
    space, name = problem.space, problem.name
    optimizer = problem.optimizer("adamw", 1e-2)
    for _ in range(5):
        g = problem.gradients()[name].double()
        grads = {n: p.grad.double().clone() for n, p in space.params.items()}
        before = {n: p.double() for n, p in problem.params().items()}
        optimizer.step()
        moved = {n: p.detach().double() - before[n] for n, p in space.params.items()}
        now = {n: p.detach().double() for n, p in space.params.items()}
        effective = -(g * (space.value(name, now) - space.value(name, before))).sum()
        factors = -sum((grads[n] * moved[n]).sum() for n in moved)
        cross = space.scale * (g * (moved[name + B] @ moved[name + A])).sum()
        # grads were rounded to float32: 2^-24 of each of their products
        slack = 2**-22 * sum((grads[n] * moved[n]).abs().sum() for n in moved)
        assert float((effective - (factors - cross)).abs()) <= float(slack)


def _path(regression, mix=None, steps=4):
    """U and its gradient along a path of factors; the same path with B Q and Q^-1 A where `mix` is Q."""
    problem = regression("lora", seed=1)
    space, name = problem.space, problem.name
    optimizer = problem.optimizer("adamw", 3e-2)
    omega = {"u": 0.0, "b": 0.0}
    inverse = None if mix is None else torch.linalg.inv(mix)

    def mixed(params):
        a, b = params[name + A].double(), params[name + B].double()
        return (a, b) if mix is None else (inverse @ a, b @ mix)

    start = mixed(problem.params())
    for _ in range(steps):
        g = problem.gradients()[name].double()
        before = mixed(problem.params())
        optimizer.step()
        after = mixed(problem.params())
        omega["u"] = omega["u"] - g * space.scale * (after[1] @ after[0] - before[1] @ before[0])
        omega["b"] = omega["b"] - space.scale * (g @ before[0].T) * (after[1] - before[1])
    moved = space.scale * (after[1] @ after[0] - start[1] @ start[0])
    return omega, moved


def test_only_the_effective_space_does_not_depend_on_the_factors(regression):
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 2 * torch.eye(4)
    (plain, moved), (other, moved_too) = _path(regression), _path(regression, mix)
    scale = float(plain["u"].abs().max())
    assert float((plain["u"] - other["u"]).abs().max()) < 1e-12 * scale
    a, b = (importance(o["u"].float(), m.float())[0].double() for o, m in ((plain, moved), (other, moved_too)))
    # rounding to float32 and the clamp at 0: an element as small as its error may fall on either side
    assert float((a - b).abs().max()) <= 2**-20 * float(a.max())
    penalties = [float((o * m.square()).sum()) for o, m in ((a, moved), (b, moved_too))]
    assert penalties[0] == pytest.approx(penalties[1], rel=2**-20)
    assert float((plain["b"] - other["b"]).abs().max()) > 0.05 * float(plain["b"].abs().max())


def test_a_penalty_holds_one_dense_update_at_a_time(tiny_program, monkeypatch):
    space = make_space(tiny_program, "lora", "all-linear", 2, 0)
    for p in space.params.values():
        p.grad = torch.zeros_like(p)
    alive, most, whole = weakref.WeakSet(), 0, type(space).value

    class Watched(torch.Tensor):
        pass

    def value(self, name, params=None):
        nonlocal most
        made = whole(self, name, params).as_subclass(Watched)
        gc.collect()
        alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(type(space), "value", value)
    anchor = {n: p.detach().clone() for n, p in space.params.items()}
    Penalty(anchor).add(space, 1.0)
    # of one linear U, U*, and what is left of the one before while the next is made
    assert len(space.layers) == 14 and most <= 4


@pytest.mark.parametrize(
    ("kind", "targets", "words"),
    [
        ("qlora", "all-linear", "expected one of weights, lora, road_1"),
        ("lora", ["query"], "no linear called 'query'"),
        ("lora", [], "no linear called none"),
        ("lora", "all", "only weights can be"),
    ],
)
def test_bad_wishes_are_one_sentence(tiny_program, kind, targets, words):
    with pytest.raises(TpvcError, match=words):
        make_space(tiny_program, kind, targets, 4, 0)


def test_a_rank_that_does_not_fit(tiny_program):
    with pytest.raises(TpvcError, match="expected 1 to 32"):
        make_space(tiny_program, "lora", "all-linear", 33, 0)


@pytest.mark.parametrize("kind", ["weights", "lora", "road_1", "road_2", "road_4"])
def test_a_fresh_space_is_the_model(tiny_program, kind):
    from tpvc.compiler import interpret
    from tpvc.compiler.tuning.space import held_by

    space = make_space(tiny_program, kind, "all-linear", 4, 0)
    ids = torch.arange(3, 13)[None]
    held = held_by(tiny_program, space, "cpu", torch.float32)
    with torch.no_grad():
        program, weight = space.weight(held, torch.float32)
        found = interpret.logits(program, ids, weight=weight, adapter_ids=torch.tensor([space.adapter]))
        seen, weight = space.seen(held, torch.float32, space.opened())
        other = interpret.logits(seen, ids, weight=weight, adapter_ids=torch.tensor([space.adapter]))
        wanted = interpret.logits(tiny_program, ids)
    assert torch.equal(found, wanted) and torch.equal(other, wanted)
    for name in space.layers:
        change, against = space.drift(name)
        assert not change.any() and change.shape == space.value(name).shape
        assert against.any() or name.endswith("theta")


def test_all_trains_everything_and_protects_the_linears(tiny_program):
    space = make_space(tiny_program, "weights", "all", 4, 0)
    assert set(space.params) == set(tiny_program.params)
    assert len(space.layers) == 14 and "lm_head.weight" not in space.layers
