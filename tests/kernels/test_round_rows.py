"""Rounding rows under Triton's interpreter: the codes and scales of the reference, bit for bit."""

import pytest
import torch

from tpvc.compiler import ops
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.round_rows import round_rows, round_rows_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random(rows, width, dtype, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", [(1, 1), (3, 100), (2, 2100), (5, 64)])
def test_codes_and_scales(rows, width, dtype, kind):
    x = random(rows, width, dtype)
    found, wanted = round_rows(x, kind=kind), round_rows_reference(x, kind=kind)
    assert found.codes.dtype == wanted.codes.dtype and found.kind == kind and found.dtype == dtype
    assert torch.equal(found.codes.float(), wanted.codes.float()) and torch.equal(found.scale, wanted.scale)
    assert float(found.codes.float().abs().max()) == ops.ROW_RANGE[kind]
    by_op = ops.round_rows(x.float(), kind=kind)
    assert torch.equal(found.codes.float() * found.scale[:, None], by_op)


def test_halves_go_to_the_even_neighbour():
    """With 254 in the row a step is 2: odd numbers lie half way."""
    x = torch.tensor([[254.0, 1, 3, 5, -1, -3, 253, -254]])
    found = round_rows(x, kind="int8")
    assert found.codes.tolist() == [[127, 0, 2, 2, 0, -2, 126, -127]] and found.scale.tolist() == [2.0]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_row_of_zeros_and_one_of_tiny_numbers(kind):
    x = torch.tensor([[0.0, 0, 0], [1e-38, -1e-38, 0], [3e38, 1, 0]])
    found, wanted = round_rows(x, kind=kind), round_rows_reference(x, kind=kind)
    assert torch.equal(found.codes.float(), wanted.codes.float()) and torch.equal(found.scale, wanted.scale)
    assert not found.codes[:2].float().any() and bool((found.scale > 0).all())


def test_rows_may_lie_apart():
    whole = random(3, 96, torch.float16)
    apart, close = round_rows(whole[:, 32:64], kind="int8"), round_rows(whole[:, 32:64].contiguous(), kind="int8")
    assert torch.equal(apart.codes, close.codes) and torch.equal(apart.scale, close.scale)


def test_what_cannot_be_rounded_is_refused():
    for words, call in (
        (r"int64 \[2, 64\]; expected rows", lambda: round_rows(torch.zeros(2, 64).long(), kind="int8")),
        (r"float32 \[64\]; expected rows", lambda: round_rows(torch.zeros(64), kind="int8")),
        ("'int4'; expected int8 or fp8", lambda: round_rows(torch.zeros(2, 64), kind="int4")),
    ):
        with pytest.raises(TpvcError, match=words):
            call()


@pytest.mark.slow
def test_compiles(compiles):
    launches = []
    for dtype, width in ((torch.float16, 4096), (torch.bfloat16, 14336), (torch.bfloat16, 2880)):
        round_rows(torch.zeros(2, width, dtype=dtype), kind="int8", run=launches.append)
    compiles(launches)
