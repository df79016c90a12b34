"""The identities of the path integral, on problems whose answer is known."""

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning.importance import importance, record
from tpvc.compiler.tuning.layer_coefficients import coefficients


@pytest.mark.parametrize("kind", ["weights", "lora", "road_1"])
def test_no_movement_no_importance(regression, kind):
    problem = regression(kind)
    found = problem.learn(problem.optimizer("adamw", 0.0), 3)
    assert problem.gradients()[problem.name].any()
    omega, told = importance(found.omega, found.moved)
    assert not found.omega.any() and not omega.any() and (told.elements, told.mass) == (0, 0)
    alpha = coefficients("normalised", torch.zeros(5), torch.full((5,), 9))
    assert torch.equal(alpha, torch.ones(5))


# First order in the step: what is left is half the curvature times the squared step. The table of the notes says for
# these 200 steps at most 0.1 % (small rates) and 9 % (AdamW 1e-2, effective space).
@pytest.mark.parametrize(
    ("kind", "name", "lr", "off"),
    [
        ("lora", "sgd", 1e-3, 0.01),
        ("lora", "adamw", 1e-4, 0.01),
        ("lora", "adamw", 1e-3, 0.01),
        ("lora", "adamw", 1e-2, 0.1),
        ("weights", "sgd", 1e-2, 0.01),
        ("weights", "adamw", 1e-4, 0.01),
        ("road_1", "adamw", 1e-4, 0.01),
    ],
)
def test_the_sum_is_the_loss_drop(regression, kind, name, lr, off):
    problem = regression(kind)
    optimizer = problem.optimizer(name, lr)
    total, first = 0.0, problem.now()
    omega = {n: torch.zeros_like(problem.space.value(n)) for n in problem.space.layers}
    for _ in range(200):
        own, before = problem.gradients(), problem.params()
        optimizer.step()
        record(omega, problem.space, own, before)
    total = sum(float(o.double().sum()) for o in omega.values())
    assert total / (first - problem.now()) == pytest.approx(1, abs=off)


def test_gradients_of_both_sides_are_exact_on_a_quadratic(regression):
    """The loss of full weights is quadratic. Left is rounding: of the losses, 2^-24 of them each, against the drop."""
    problem = regression("weights")
    first = problem.now()
    found = problem.learn(problem.optimizer("sgd", 0.5), 50, two_sided=True)
    assert float(found.omega.double().sum()) == pytest.approx(found.loss_drop, abs=50 * 2**-22 * first)
    rough = regression("weights")
    one = rough.learn(rough.optimizer("sgd", 0.5), 50)
    assert abs(float(one.omega.double().sum()) / one.loss_drop - 1) > 0.05


def test_small_batches_add_up_their_own_drops(regression):
    """With batches of 8 omega measures loss drops on the batches seen, which is more than what the whole loss fell."""
    problem = regression("weights", noise=0.5)
    optimizer = problem.optimizer("sgd", 2e-2)
    found = problem.learn(optimizer, 400, rows=lambda s: slice(8 * (s % 8), 8 * (s % 8) + 8), two_sided=True)
    total = float(found.omega.double().sum())
    assert total == pytest.approx(found.drop, rel=1e-3)
    assert total > 1.1 * found.loss_drop


@pytest.mark.parametrize("h", [0.5, 3.0])
@pytest.mark.parametrize("start", [0.3, -20.0])
def test_a_quadratic_gives_half_its_curvature_from_anywhere(h, start):
    """loss h/2 theta^2 from `start` to a thousandth of it: omega is the loss drop to 1 - 1e-6 and first order in the
    step of 1e-3; xi here is nothing, as its share is of one element."""
    theta, omega = start, 0.0
    while abs(theta) > 1e-3 * abs(start):
        g = h * theta
        omega += g * 1e-3 * g
        theta -= 1e-3 * g
    found, _ = importance(torch.tensor([omega]), torch.tensor([theta - start]), 1e-9)
    assert float(found) == pytest.approx(h / 2, rel=5e-3)


def test_under_plain_gradient_descent_it_is_the_rate_times_squared_gradients(regression):
    """Each of 20 additions rounds by 2^-24 of the sum, and the difference of two weights by 2^-23 of the weight."""
    problem, lr = regression("weights"), 0.1
    optimizer, squares = problem.optimizer("sgd", lr), 0.0
    omega = {problem.name: torch.zeros_like(problem.space.value(problem.name))}
    slack = torch.zeros_like(omega[problem.name])
    for _ in range(20):
        own, before = problem.gradients(), problem.params()
        optimizer.step()
        record(omega, problem.space, own, before)
        squares = squares + lr * own[problem.name].square()
        slack += own[problem.name].abs() * problem.space.value(problem.name).abs() * 2**-22
    assert bool(((omega[problem.name] - squares).abs() <= slack + 20 * 2**-23 * squares).all())


def test_what_is_negative_counts_nothing_and_is_told():
    omega = torch.tensor([[2.0, -1.0], [-0.5, 4.0]])
    found, told = importance(omega, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert (told.elements, told.mass, told.total) == (2, -1.5, 4.5)
    assert bool((found >= 0).all()) and bool(found.isfinite().all())
    # xi is a tenth of the mean squared movement, 1/2: an element that came back is divided by that
    assert found.tolist() == [[pytest.approx(2 / 1.05), 0], [0, pytest.approx(4 / 0.05)]]


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan")])
def test_xi_is_above_zero(c):
    with pytest.raises(TpvcError, match="expected a share above 0"):
        importance(torch.ones(2), torch.ones(2), c)


def test_the_scale_of_the_movement_does_not_matter():
    """xi goes with the movement: a run that went a thousand times as far over a loss as much flatter is the same."""
    draw = torch.Generator().manual_seed(0)
    omega, moved = torch.rand(7, generator=draw), torch.rand(7, generator=draw)
    near, _ = importance(omega, moved)
    far, _ = importance(omega, 1024 * moved)
    assert torch.equal(near, far * 1024**2)
