"""Sums, products and the like under Triton's interpreter, against their references and `compiler.ops`."""

import pytest
import torch

from tpvc.compiler import ops
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.pointwise import KINDS, pointwise, pointwise_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
OPS = {
    "add": lambda a, b: ops.add(a, b),
    "mul": lambda a, b: ops.mul(a, b),
    "scale": lambda a, b: ops.scale(a, factor=2.5),
    "softcap": lambda a, b: ops.softcap(a, cap=2.5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 700)])
def test_every_kind(kind, shape, dtype, close):
    """Sums, products and scales are one rounding each; a tanh is off by some 2^-23 of 1, times 2.5."""
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(dtype) * 3 for s in (0, 1))
    b = b if kind in ("add", "mul") else None
    found, wanted = (f(a, b, 2.5, kind=kind) for f in (pointwise, pointwise_reference))
    if kind == "softcap":
        close(found, wanted, 8 * 2**-24 * 2.5)
    else:
        assert torch.equal(found, wanted)
    close(wanted, OPS[kind](a.float(), None if b is None else b.float()).to(dtype), 8 * 2**-24 * 2.5)


def test_what_does_not_belong_together_is_refused():
    x = torch.zeros(2, 8)
    for words, call in (
        ("'sub'; expected one of add, mul", lambda: pointwise(x, x, kind="sub")),
        ("'add' was given 1 tensors; expected 2", lambda: pointwise(x, kind="add")),
        ("'scale' was given 2 tensors; expected 1", lambda: pointwise(x, x, kind="scale")),
        ("expected contiguous", lambda: pointwise(x.T, kind="scale")),
        (r"are \[2, 8\] and \[1, 8\]", lambda: pointwise(x, x[:1], kind="add")),
    ):
        with pytest.raises(TpvcError, match=words):
            call()


@pytest.mark.slow
def test_compiles(compiles):
    launches, x = [], torch.zeros(2, 4096, dtype=torch.bfloat16)
    for kind in KINDS:
        pointwise(x, x if kind in ("add", "mul") else None, 2.0, kind=kind, run=launches.append)
    compiles(launches)
