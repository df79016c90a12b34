"""Activations under Triton's interpreter, against their references and `compiler.ops`."""

import pytest
import torch

from tpvc.compiler import ops
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.activation import activation, activation_reference, gated, gated_reference

KINDS = list(ops.ACTIVATIONS)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # where a sigmoid is 0


def random(rows, width, dtype, seed=0):
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def bound(x, up=None):
    """A sigmoid, tanh or erf is off by a few u = 2^-24 of 1, and the argument of tanh by 4 u of itself, which moves a
    sigmoid by at most |a| / e^|a| < 1 of that: 16 u in all, times what it multiplies."""
    return 16 * 2**-24 * x.double().abs() * (1 if up is None else up.double().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,width", [(1, 1), (3, 100), (2, 1030)])
def test_activation(kind, dtype, rows, width, close):
    x = random(rows, width, dtype)
    found, wanted = activation(x, kind=kind), activation_reference(x, kind=kind)
    close(found, wanted, bound(x))
    close(wanted, ops.activation(x.float(), kind=kind).to(dtype), bound(x))
    up = random(rows, width, dtype, 1)
    found, wanted = gated(x, up, kind=kind), gated_reference(x, up, kind=kind)
    close(found, wanted, bound(x, up))
    by_ops = ops.mul(ops.activation(x.float(), kind=kind), up.float()).to(dtype)
    close(wanted, by_ops, bound(x, up))


def test_halves_of_one_product():
    whole = random(3, 96, torch.float16)
    gate, up = whole.chunk(2, 1)
    assert torch.equal(gated(gate, up, kind="silu"), gated(gate.contiguous(), up.contiguous(), kind="silu"))


@pytest.mark.parametrize("kind", KINDS)
def test_large_values(kind):
    """No overflow on the way: 60000 stays, -60000 goes to 0."""
    x = torch.tensor([[6e4, -6e4, 0.0]]).half()
    assert torch.equal(activation(x, kind=kind), torch.relu(x))


def test_what_does_not_belong_together_is_refused():
    x = torch.zeros(2, 8)
    for words, call in (
        ("'tanh'; expected one of silu, relu", lambda: activation(x, kind="tanh")),
        (r"int32 \[2, 8\]", lambda: activation(x.int(), kind="silu")),
        (r"gate is \[2, 8\] and up \[1, 8\]", lambda: gated(x, x[:1], kind="silu")),
    ):
        with pytest.raises(TpvcError, match=words):
            call()


@pytest.mark.slow
def test_compiles(compiles):
    launches = []
    for kind in KINDS:
        x = torch.zeros(2, 4096, dtype=torch.bfloat16)
        gated(x, x, kind=kind, run=launches.append)
        activation(x.half(), kind=kind, run=launches.append)
    compiles(launches)
