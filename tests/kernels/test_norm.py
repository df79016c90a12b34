"""RMS norm and layer norm under Triton's interpreter, against their references and `compiler.ops`."""

import pytest
import torch

from tpvc.compiler import ops
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPS = 1e-5


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(weight, width, bias=None):
    """Sums of D squares in float32 are off by at most D u of themselves, u = 2^-24, hence a root by half of that; what
    is normed is at most sqrt(D), the root, quotient and product add 4 u; a mean of D is off by D u of at most the root
    of the variance plus its own size, and the bias adds u of itself."""
    size = float(weight.abs().max()) + 1
    return (2 * width + 8) * 2**-24 * width**0.5 * size + (0 if bias is None else 2**-24 * float(bias.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,features,width", [(1, 1, 1), (1, 100, 100), (3, 64, 64), (5, 72, 24), (2, 2100, 2100)])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(dtype, rows, features, width, added, plus_one, close):
    x, weight = random(rows, features, dtype=dtype), random(width, seed=1, dtype=dtype)
    residual = random(rows, features, seed=2, dtype=dtype) * 4 if added else None
    found, stream = rms_norm(x, weight, EPS, residual, plus_one=plus_one)
    wanted, sums = rms_norm_reference(x, weight, EPS, residual, plus_one=plus_one)
    assert torch.equal(stream, sums) and (stream is x) == (not added)
    close(found, wanted, bound(weight, width))
    by_op = ops.rms_norm(x + residual if added else x, weight=weight.float(), eps=EPS, plus_one=plus_one)
    close(wanted, by_op, bound(weight, width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,features", [(1, 1), (1, 100), (3, 64), (2, 2100)])
@pytest.mark.parametrize("biased,added", [(False, False), (True, False), (True, True)])
def test_layer_norm(dtype, rows, features, biased, added, close):
    x, weight = random(rows, features, dtype=dtype) + 3, random(features, seed=1, dtype=dtype)
    bias = random(features, seed=3, dtype=dtype) if biased else None
    residual = random(rows, features, seed=2, dtype=dtype) if added else None
    found, stream = layer_norm(x, weight, bias, EPS, residual)
    wanted, sums = layer_norm_reference(x, weight, bias, EPS, residual)
    assert torch.equal(stream, sums) and (stream is x) == (not added)
    # the mean, 3 or so, is the size of a few standard deviations: 8 times the bound of numbers around 0 is plenty
    limit = 8 * bound(weight, features, bias)
    close(found, wanted, limit)
    wide = ops.layer_norm(sums.float(), weight=weight.float(), bias=None if bias is None else bias.float(), eps=EPS)
    close(wanted, wide.to(dtype), limit)


def test_rows_may_lie_apart():
    """The keys of a fused projection."""
    whole, weight = random(3, 96, dtype=torch.float16), random(16, seed=1, dtype=torch.float16)
    part = whole[:, 32:64]
    assert torch.equal(rms_norm(part, weight, EPS)[0], rms_norm(part.contiguous(), weight, EPS)[0])


def test_eps_is_used():
    x, weight = torch.zeros(1, 8), torch.ones(8)
    assert torch.equal(rms_norm(x, weight, 1e-6)[0], x)
    torch.testing.assert_close(rms_norm(x + 1, weight, 3.0)[0], torch.full((1, 8), 0.5))


def test_what_does_not_belong_together_is_refused():
    x, weight = torch.zeros(2, 64), torch.zeros(64)
    for words, call in (
        (r"int64 \[2, 64\]; expected rows", lambda: rms_norm(x.long(), weight, EPS)),
        (r"shape \[48\]; expected one dimension that divides 64", lambda: rms_norm(x, weight[:48], EPS)),
        (r"bias has shape \[3\]", lambda: layer_norm(x, weight, weight[:3], EPS)),
        (r"residual is \[1, 64\]", lambda: rms_norm(x, weight, EPS, x[:1])),
    ):
        with pytest.raises(TpvcError, match=words):
            call()


@pytest.mark.slow
def test_compiles(compiles):
    launches = []
    for dtype, width in ((torch.float16, 4096), (torch.bfloat16, 14336), (torch.bfloat16, 2880)):
        x, weight = torch.zeros(2, width, dtype=dtype), torch.zeros(width, dtype=dtype)
        rms_norm(x, weight, EPS, x, plus_one=True, run=launches.append)
        layer_norm(x, weight, weight, EPS, run=launches.append)
    rms_norm(x, weight[:180], EPS, run=launches.append)
    compiles(launches)
