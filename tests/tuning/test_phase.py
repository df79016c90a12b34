"""Steps of both phases on the tiny model: penalties of nothing, parts of a batch, bfloat16, and how phi is sought."""

import math

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning.examples import Encoded
from tpvc.compiler.tuning.log_codes import encode
from tpvc.compiler.tuning.loss import batch_of
from tpvc.compiler.tuning.parallel import Ranks
from tpvc.compiler.tuning.penalty import Penalty
from tpvc.compiler.tuning.phase import backward_of, domain_step, general_step, strength
from tpvc.compiler.tuning.space import held_by, make_space

KINDS = ["weights", "lora", "road_1"]
ALONE = Ranks()


@pytest.fixture(scope="module")
def examples():
    """Twelve windows of 5 to 16 tokens, the first of each given."""
    draw = torch.Generator().manual_seed(0)
    lengths = [5 + i % 12 for i in range(12)]
    return [Encoded(tuple(torch.randint(3, 384, (n,), generator=draw).tolist()), 1) for n in lengths]


def _domain(program, kind, examples, make_penalty, phi, micro=4, steps=6, dtype=torch.float32):
    """Parameters and optimiser state after some steps, and what the steps returned."""
    space = make_space(program, kind, "all-linear", 4, 0)
    held = held_by(program, space, "cpu", dtype)
    backward = backward_of(examples, micro, space.adapter, ALONE)
    step = domain_step(
        space, make_penalty(space), strength(phi, None), lambda: space.weight(held, dtype), backward, steps, ALONE
    )
    optimizer = torch.optim.AdamW(list(space.params.values()), lr=3e-3, weight_decay=0.01)
    told = [step(optimizer, [(4 * s + i) % 12 for i in range(4)], s) for s in range(steps)]
    state = [t for p in space.params.values() for t in (p.detach(), *optimizer.state[p].values())]
    return state, told


def _anchor(space):
    return {n: p.detach().clone() for n, p in space.params.items()}


def _zero(space):
    return Penalty(_anchor(space), {n: encode(torch.zeros(space.value(n).shape)) for n in space.layers})


@pytest.mark.parametrize("kind", KINDS)
def test_phi_or_omega_of_zero_is_plain_training_bit_for_bit(tiny_program, examples, kind):
    plain, told = _domain(tiny_program, kind, examples, lambda space: None, 0.0)
    nothing, _ = _domain(tiny_program, kind, examples, lambda space: Penalty(_anchor(space)), 0.0)
    empty, _ = _domain(tiny_program, kind, examples, _zero, 3.0)
    held, other = _domain(tiny_program, kind, examples, lambda space: Penalty(_anchor(space)), 3.0)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, nothing, empty, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, held, strict=True))
    assert other[0][1] == 0 and other[-1][1] > 0 and told[-1][1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_equal_the_batch(tiny_program, examples, kind):
    """Sums over at most 64 tokens in another order: 64 x 2^-24 of the largest gradient."""
    found = []
    for micro in (12, 5, 1):
        space = make_space(tiny_program, kind, "all-linear", 4, 0)
        held = held_by(tiny_program, space, "cpu", torch.float32)
        loss = backward_of(examples, micro, space.adapter, ALONE)(
            lambda space=space, held=held: space.weight(held, torch.float32), list(range(12))
        )
        found.append((loss, {n: p.grad for n, p in space.params.items()}))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=2**-20)
        for name, wanted in found[0][1].items():
            assert float((gradients[name] - wanted).abs().max()) <= 64 * 2**-24 * float(wanted.abs().max()) + 1e-9


def test_every_token_weighs_the_same_whatever_its_example(tiny_program, examples):
    from tpvc.compiler.ops import OPS
    from tpvc.compiler.tuning.loss import answer_logits

    space = make_space(tiny_program, "lora", "all-linear", 4, 0)
    held = held_by(tiny_program, space, "cpu", torch.float32)
    loss = backward_of(examples, 3, -1, ALONE)(lambda: space.weight(held, torch.float32), list(range(12)))
    batch = batch_of(examples)
    with torch.no_grad():
        program, weight = space.weight(held, torch.float32)
        logits = answer_logits(program, weight, batch, -1, OPS)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch.targets)), rel=2**-20)


@pytest.mark.parametrize("kind", KINDS)
def test_omega_is_taken_of_the_unclipped_gradient_and_the_real_step(tiny_program, examples, kind):
    """Of one step from 0: omega + g Delta is nothing, with g the gradient of the loss and Delta what AdamW did."""
    space = make_space(tiny_program, kind, "all-linear", 4, 0)
    held = held_by(tiny_program, space, "cpu", torch.float32)
    backward = backward_of([*examples[:4]], 4, space.adapter, ALONE)
    omega = {n: torch.zeros_like(space.value(n)) for n in space.layers}
    before = _anchor(space)
    step = general_step(space, omega, lambda leaves: lambda: space.seen(held, torch.float32, leaves), backward, ALONE)
    optimizer = torch.optim.AdamW(list(space.params.values()), lr=1e-2)
    (loss,) = step(optimizer, [0, 1, 2, 3], 0)
    other = make_space(tiny_program, kind, "all-linear", 4, 0)
    leaves = other.opened()
    backward(lambda: other.seen(held, torch.float32, leaves), [0, 1, 2, 3])
    norm = 0.0
    for name, found in omega.items():
        g = other.gradient(leaves, name)
        norm += float(g.square().sum())
        assert torch.equal(found, -(g * (space.value(name) - space.value(name, before))))
    assert norm > 1 or kind == "road_1"  # it was clipped
    assert loss > 0 and any(o.any() for o in omega.values())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_has_masters_whose_smallest_step_counts(tiny_program, examples, kind):
    """A rate of 1e-6 moves no bfloat16 weight, whose steps are 2^-9 of it; the masters move, and omega says so."""
    space = make_space(tiny_program, kind, "all-linear", 4, 0)
    held = held_by(tiny_program, space, "cpu", torch.bfloat16)
    backward = backward_of(examples, 4, space.adapter, ALONE)
    omega = {n: torch.zeros_like(space.value(n)) for n in space.layers}
    before = _anchor(space)
    step = general_step(space, omega, lambda leaves: lambda: space.seen(held, torch.bfloat16, leaves), backward, ALONE)
    step(torch.optim.AdamW(list(space.params.values()), lr=1e-6, weight_decay=0), [0, 1, 2, 3], 0)
    assert all(p.dtype == torch.float32 for p in (*space.params.values(), *omega.values()))
    for name, p in space.params.items():
        same = p.to(torch.bfloat16) == before[name].to(torch.bfloat16)
        moved = p != before[name]
        if kind == "weights":
            assert float((same & moved).float().mean()) > 0.9 and float(omega[name][same].double().sum()) > 0
    assert sum(float(o.double().sum()) for o in omega.values()) > 0


def test_bfloat16_learns_what_float32_does(tiny_program, examples):
    """Losses of random weights are about ln 384; products in bfloat16 are off by 2^-8 of themselves."""
    wanted = _domain(tiny_program, "weights", examples, lambda space: None, 0.0)[1]
    found = _domain(tiny_program, "weights", examples, lambda space: None, 0.0, dtype=torch.bfloat16)[1]
    assert [f[0] for f in found] == pytest.approx([w[0] for w in wanted], rel=2**-6)
    assert found[-1][0] < found[0][0]


def test_a_loss_that_is_no_number_changes_nothing(tiny_program, examples):
    space = make_space(tiny_program, "lora", "all-linear", 4, 0)
    before = _anchor(space)
    step = domain_step(space, None, strength(0.0, None), lambda: None, lambda see, indices: float("nan"), 4, ALONE)
    (loss, added) = step(torch.optim.AdamW(list(space.params.values()), lr=1.0), [0], 0)
    assert math.isnan(loss) and math.isnan(added)
    assert all(torch.equal(p, before[n]) for n, p in space.params.items())


def test_phi_follows_from_a_ratio_behind_the_first_quarter_and_stays():
    found = strength(None, 0.05)
    seen = []
    for step in range(100):
        found.learn(2.0, 0.01 * step, step, 100)
        seen.append(float(found.phi))
    # seen[s] is what step s + 1 uses
    assert seen[:25] == [0] * 25 and seen[25:] == [pytest.approx(0.05 * 2 / 0.25)] * 75


def test_a_ratio_that_no_phi_reaches_does_not_drive_phi_up():
    """One weight with the loss L - g d + h d^2 / 2, which falls by F = g^2 / 2h = 1 where nothing holds it.

    With x = 2 phi Omega / h it rests at d = g / h / (1 + x), where the penalty is at most F / 4, below the 0.05 L that
    are wanted. Of the free movement, g / h behind a quarter of the run, phi is such that x = 0.05 (L - F) / F.
    """
    level, g, h, omega = 10.0, 2.0, 2.0, 3.0
    found, d = strength(None, 0.05), 0.0
    for step in range(400):
        phi = float(found.phi)
        found.learn(level - g * d + h * d * d / 2, omega * d * d, step, 400)
        d -= 0.1 * (h * d - g + 2 * phi * omega * d)
    fall = g * g / h / 2
    x = 0.05 * (level - fall) / fall
    assert 2 * float(found.phi) * omega / h == pytest.approx(x, rel=1e-6)
    assert d == pytest.approx(g / h / (1 + x), rel=1e-6) and d > 0.5 * g / h


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_short_run_has_a_phi_too(steps):
    found = strength(None, 0.05)
    for step in range(steps):
        found.learn(2.0, float(step), step, steps)
    assert (float(found.phi) > 0) == (steps > 1)


def test_a_given_phi_stays():
    found = strength(0.3, None)
    for step in range(50):
        found.learn(1.0, 100.0, step, 50)
    assert float(found.phi) == 0.3


@pytest.mark.parametrize(
    ("phi", "ratio", "words"),
    [
        (-0.1, None, "phi is -0.1; expected a number of at least 0"),
        (float("nan"), None, "expected a number of at least 0"),
        (None, -1.0, "the ratio of penalty to loss is -1"),
        (0.1, 0.1, "expected one of them"),
    ],
)
def test_strengths_that_no_penalty_can_have(phi, ratio, words):
    with pytest.raises(TpvcError, match=words):
        strength(phi, ratio)
