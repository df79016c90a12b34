"""The linear kernels under Triton's interpreter, against their reference and against float64."""

import pytest
import torch

from tpvc.compiler.adapters.road import Rotation
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, QTensor
from tpvc.kernels.linear import Bank, Config, configs, linear, linear_reference
from tpvc.kernels.slab import dequantise, length, pack, pack_floats

EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


def matrix(out, depth, bits, group, symmetric, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, group, symmetric)
    groups = (1, 1) if group == 0 else (out, depth // grid.columns(depth))
    codes = torch.randint(0, 2**bits, (out, depth), generator=generator).to(torch.uint8)
    scale = (torch.rand(groups, generator=generator) * 0.02 + 0.01).to(dtype).float()
    zero = None if symmetric else torch.randint(0, 2**bits, groups, generator=generator).to(torch.uint8)
    return pack(QTensor(codes, scale, zero, grid, dtype))


def bank_of(out, adapters, group, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for _ in range(adapters):
        theta, alpha = torch.randn(2, out // 2, generator=generator)
        vectors.append(Rotation("road_1", group, theta, 1 + alpha / 4).vectors)
    return Bank(*(torch.stack(v).to(dtype) for v in zip(*vectors, strict=True)), group)


def compare(found, x, weight, bias=None, bank=None, ids=None):
    """Sums of K products in float32, in whatever order, are off by at most K eps of the sum of their sizes; the result
    is rounded once, and a rotation adds two products of size at most that of the bank's largest entry."""
    wanted = linear_reference(x, weight, bias, bank, ids)
    w = dequantise(weight, x.dtype).double()
    size = (x.double().abs() @ w.abs().T).max() + (0 if bias is None else bias.double().abs().max())
    if bank is not None:
        size = size * 2 * max(float(bank.cosine.abs().max()), float(bank.sine.abs().max()), 1)
    limit = (weight.depth + 4) * 2**-24 * float(size) * 2
    # both results are rounded to x's dtype: a difference in the sums may fall on either side of a rounding edge
    limit += 2 * EPS[x.dtype] * float(wanted.double().abs().max())
    assert (found.double() - wanted.double()).abs().max() <= limit
    assert limit < 0.02 * float(size)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_number_of_rows(bits, rows):
    dtype = torch.bfloat16 if rows in (3, 17) else torch.float16
    weight = matrix(72, length(bits) + 32, bits, 32 if bits != 3 else -1, rows % 2 == 0, dtype)
    x = torch.randn(rows, weight.depth, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.randn(72).to(dtype) if rows != 4 else None
    compare(linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floats(dtype, rows):
    """Weights that were not rounded, with a bias and a rotation."""
    weight = pack_floats(torch.randn(64, 200, generator=torch.Generator().manual_seed(1)).to(dtype))
    x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows)).to(dtype)
    compare(linear(x, weight), x, weight)
    bias, bank, ids = torch.randn(64).to(dtype), bank_of(64, 1, 32, dtype), torch.zeros(rows, dtype=torch.int32)
    compare(linear(x, weight, bias, bank, ids), x, weight, bias, bank, ids)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 64, -1, 0])
def test_every_grid(group, symmetric):
    weight = matrix(40, 192, 4, group, symmetric, torch.float16)
    x = torch.randn(2, 192, generator=torch.Generator().manual_seed(3)).half()
    compare(linear(x, weight), x, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("rows", [2, 16])
def test_partial_sums_rotate_after_they_are_added(rows, split, dtype):
    """Rows with their own adapters, -1 among them."""
    weight = matrix(128, 512, 4, 128, False, dtype)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(4)).to(dtype)
    bias, bank = torch.randn(128).to(dtype), bank_of(128, 3, 32, dtype)
    ids = (torch.arange(rows) % 4 - 1).to(torch.int32)
    block = 2 if rows == 2 else 16
    found = linear(x, weight, bias, bank, ids, config=Config(block, 64, split, 4, 2))
    compare(found, x, weight, bias, bank, ids)
    plain = linear(x, weight, bias, config=Config(block, 64, split, 4, 2))
    compare(plain, x, weight, bias)
    compare(found[ids < 0], x[ids < 0], weight, bias)
    assert not torch.allclose(found[ids >= 0].float(), plain[ids >= 0].float(), rtol=0.1)


@pytest.mark.parametrize("group", [2, 8, 64])
def test_every_pairing(group):
    weight = matrix(192, 128, 4, 64, True, torch.float16)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(5)).half()
    bank, ids = bank_of(192, 2, group, torch.float16), torch.tensor([0, 1, -1, 0], dtype=torch.int32)
    compare(linear(x, weight, None, bank, ids), x, weight, None, bank, ids)


def test_the_same_call_gives_the_same_bits_and_configs_agree():
    weight = matrix(96, 1024, 4, 64, False, torch.float16)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(6)).half()
    assert torch.equal(linear(x, weight), linear(x, weight))
    chosen = configs(3, weight, None)
    assert len(chosen) == len(set(chosen)) > 1
    for config in chosen:
        compare(linear(x, weight, config=config), x, weight)


def test_tiles_own_whole_groups():
    weight = matrix(512, 128, 4, 64, False, torch.float16)
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for config in configs(rows, weight, 256):
            assert config.block_n % 256 == 0 and config.block_m & (config.block_m - 1) == 0


def test_what_does_not_belong_together_is_refused():
    weight = matrix(64, 64, 4, 64, True, torch.float16)
    x, bank = torch.zeros(2, 64).half(), bank_of(64, 1, 32, torch.float16)
    ids = torch.zeros(2, dtype=torch.int32)

    def refused(*args):
        with pytest.raises(TpvcError) as error:
            linear(*args)
        return str(error.value)

    assert "float16 [2, 32]; expected contiguous rows of 64" in refused(torch.zeros(2, 32).half(), weight)
    assert "16 bits and float weights 32" in refused(x, pack_floats(torch.zeros(64, 64)))
    assert "int64 [2, 64]" in refused(torch.zeros(2, 64, dtype=torch.int64), weight)
    assert "the bias has shape [3]" in refused(x, weight, torch.zeros(3))
    assert "come together" in refused(x, weight, None, bank)
    assert "expected [adapters, 64]" in refused(x, weight, None, Bank(torch.zeros(1, 32), torch.zeros(1, 32), 32), ids)
    assert "a power of 2 that divides 64" in refused(x, weight, None, Bank(bank.cosine, bank.sine, 48), ids)
    assert "one int32 for each of 2 rows" in refused(x, weight, None, bank, ids[:1])
