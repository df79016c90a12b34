"""The diagonal Fisher matrix: of single samples, on a problem whose answer is known."""

import pytest
import torch

from tpvc.compiler.tuning.fisher import fisher
from tpvc.compiler.tuning.parallel import Ranks


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_it_is_the_mean_of_squared_gradients_of_single_samples(regression, kind):
    """loss of row r: mean over outputs of (x W^T - y)^2, so dL/dW = 2 / out (x W^T - y) x^T; U = 0 has the same."""
    problem = regression(kind)

    def backward(see, indices):
        loss = problem.loss(*see(), indices)
        loss.backward()
        return float(loss.detach())

    def see(leaves):
        return lambda: problem.space.seen(problem.held, torch.float32, leaves)

    found = fisher(problem.space, see, len(problem.x), backward, Ranks())[problem.name]
    weight = problem.program.params["proj.weight"].double()
    x, y = problem.x.double(), problem.y.double()
    gradients = 2 / len(weight) * torch.einsum("ro,ri->roi", x @ weight.T - y, x)
    wanted = gradients.square().mean(0)
    # a gradient is off by 2^-23 of the largest terms of its residual, which has 32
    assert float((found - wanted).abs().max()) <= 64 * 2**-23 * float(gradients.abs().max()) ** 2
    whole = gradients.mean(0).square()
    assert float((wanted - whole).abs().max()) > 0.5 * float(wanted.max())  # the batch's gradient is another thing
    assert all(p.grad is None for p in problem.space.params.values())
