"""Value and gradient are those of the definition, taken in float64 by autograd."""

import pytest
import torch

from tpvc.passes.logit_divergence import CHUNK, logit_divergence


def both(shape, size):
    draw = torch.Generator().manual_seed(3)
    wanted = torch.randn(shape, generator=draw) * size
    return wanted + torch.randn(shape, generator=draw), wanted


@pytest.mark.parametrize(("shape", "size"), [((7, 96), 3.0), ((2, 5, 1000), 30.0), ((3, CHUNK // 2 + 1), 8.0)], ids=str)
def test_value_and_gradient(shape, size):
    found, wanted = both(shape, size)
    exact = found.double().requires_grad_()
    log_p, log_q = wanted.double().log_softmax(-1), exact.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    (slope,) = torch.autograd.grad(kl, exact)
    value, gradient = logit_divergence(found, wanted)
    # a log softmax is off by a rounding of the logit and of its sum, some 3 * 2^-24 of their size; chances sum to 1
    off = (
        6 * 2**-24 * float(torch.maximum(found.abs().max(), wanted.abs().max()) + torch.tensor(float(shape[-1])).log())
    )
    assert abs(float(value) - float(kl.detach())) <= off * found[..., 0].numel() + 2**-23 * float(kl.detach())
    assert float((gradient - slope).abs().max()) <= off


def test_the_same_logits_do_not_differ():
    found, _ = both((4, 50), 5.0)
    value, gradient = logit_divergence(found, found.clone())
    assert float(value) == 0 and not gradient.any()
