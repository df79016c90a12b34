"""Rows of tables under Triton's interpreter: copies and one product, so bit for bit."""

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, QTensor
from tpvc.kernels.embed import embed, embed_reference, virtual_tokens, virtual_tokens_reference
from tpvc.kernels.slab import pack, pack_floats

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 300])
def test_floats(width, dtype):
    table = random(11, width, dtype=dtype)
    for offset in (0, 2):
        ids = ints(0, 10, 3, 3, 99, -99)
        found = embed(table, ids, dtype, offset)
        assert torch.equal(found, embed_reference(table, ids, dtype, offset))
        assert torch.equal(found[:3], table[(ids[:3].long() + offset).clamp(max=10)])
        assert torch.equal(found[4], table[10]) and torch.equal(found[5], table[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_packed_head(bits, dtype, symmetric):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (13, 320), generator=generator).to(torch.uint8)
    scale = (torch.rand((13, 10), generator=generator) + 0.01).to(dtype).float()
    zero = None if symmetric else torch.randint(0, 2**bits, (13, 10), generator=generator).to(torch.uint8)
    value = QTensor(codes, scale, zero, Grid(bits, 32, symmetric), dtype)
    ids = ints(12, 0, 7, 7)
    found = embed(pack(value), ids, dtype)
    assert torch.equal(found, value.dequantize()[ids.long()].to(dtype))
    assert torch.equal(found, embed_reference(pack(value), ids, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_head_of_floats(dtype):
    table, ids = random(13, 50, dtype=dtype), ints(12, 0, 7)
    assert torch.equal(embed(pack_floats(table), ids, dtype), table[ids.long()])
    assert torch.equal(embed_reference(pack_floats(table), ids, dtype), table[ids.long()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_virtual_tokens(dtype):
    x, rows, ids = random(4, 300, dtype=dtype), random(3, 300, dtype=dtype, seed=1), ints(5, 10, 12, 9)
    found = virtual_tokens(x, ids, rows, 10)
    assert torch.equal(found, torch.stack((x[0], rows[0], rows[2], x[3])))
    assert torch.equal(found, virtual_tokens_reference(x, ids, rows, 10))


def test_what_does_not_belong_together_is_refused():
    table = torch.zeros(4, 8)
    with pytest.raises(TpvcError, match="ids are int64"):
        embed(table, torch.zeros(2, dtype=torch.int64), torch.float32)
    with pytest.raises(TpvcError, match=r"float32 \[4, 8\]; expected contiguous float16"):
        embed(table, ints(1), torch.float16)


@pytest.mark.slow
def test_compiles(compiles):
    launches, ids = [], torch.zeros(16, dtype=torch.int32)
    table = torch.zeros(64, 4096).half()
    embed(table, ids, torch.float16, 2, run=launches.append)
    virtual_tokens(torch.zeros(16, 4096).half(), ids, table, 64, run=launches.append)
    embed(pack_floats(table), ids, torch.float16, run=launches.append)
    for bits in (3, 8):
        value = QTensor(
            torch.zeros(64, 256).to(torch.uint8), torch.ones(64, 2), None, Grid(bits, 128, True), torch.float16
        )
        embed(pack(value), ids, torch.float16, run=launches.append)
    compiles(launches)
