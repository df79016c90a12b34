"""Packing has an inverse, bit for bit, and the layout is the one that is written down."""

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, QTensor
from tpvc.kernels.slab import SUB, dequantise, length, pack, pack_floats, unpack


def drawn(out, depth, bits, group, symmetric, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, group, symmetric)
    groups = (1, 1) if group == 0 else (out, depth // grid.columns(depth))
    codes = torch.randint(0, 2**bits, (out, depth), generator=generator).to(torch.uint8)
    scale = (torch.rand(groups, generator=generator) * 0.02 + 0.01).to(dtype).float()
    zero = None if symmetric else torch.randint(0, 2**bits, groups, generator=generator).to(torch.uint8)
    return QTensor(codes, scale, zero, grid, dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 48, 96, -1, 0])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_round_trip(bits, group, symmetric):
    value = drawn(24, 96, bits, group, symmetric)
    slabs = pack(value)
    assert slabs.words.dtype == torch.int32 and slabs.words.shape[0] % SUB == 0
    stored = 3 if bits == 3 else slabs.bits
    words = slabs.words.numel() + (0 if slabs.high is None else slabs.high.numel())
    assert words * 32 == -(-96 // length(slabs.bits)) * length(slabs.bits) * 24 * stored
    back = unpack(slabs, value.grid)
    assert torch.equal(back.codes, value.codes) and back.scale_dtype == value.scale_dtype
    assert torch.equal(back.dequantize(), value.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_where_every_code_lies(bits):
    """Against the definition, one code at a time."""
    value = drawn(3, 2 * length(bits), bits, -1, True)
    slabs = pack(value)
    plane = 2 if bits == 3 else bits
    fields = 32 // plane
    for k in range(value.shape[1]):
        slab, inside = divmod(k, length(bits))
        field, r = divmod(inside, SUB)
        for n in range(3):
            word = int(slabs.words[slab * SUB + r, n]) & 0xFFFFFFFF
            code = (word >> (plane * field)) & (2**plane - 1)
            if bits == 3:
                j, r8 = divmod(inside, 8)
                third = (int(slabs.high[slab * 8 + r8, n]) & 0xFFFFFFFF) >> j & 1
                code |= third << 2
            assert code == int(value.codes[n, k])
            assert fields * plane == 32


def test_dequantised_in_half_is_rounded_once():
    value = drawn(8, 64, 4, 32, False)
    assert torch.equal(dequantise(pack(value), torch.float16), value.dequantize().half())
    assert torch.equal(dequantise(pack(value), torch.float32), value.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floats_are_kept_by_their_bits(dtype):
    value = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    value[0, :3] = torch.tensor([float("inf"), -0.0, 2e-7])
    slabs = pack_floats(value)
    assert slabs.scale is None and slabs.words.shape == (48 * dtype.itemsize // 4 if dtype.itemsize == 4 else 32, 5)
    back = dequantise(slabs, dtype)
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    assert torch.equal(back.view(bits), value.view(bits))


def test_groups_that_a_product_would_span_are_refused():
    with pytest.raises(TpvcError, match="groups of 24 columns cannot be packed; expected a multiple of 16"):
        pack(drawn(4, 48, 4, 24, True))
