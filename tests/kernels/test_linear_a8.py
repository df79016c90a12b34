"""The linear on rounded activations under Triton's interpreter: integers exactly, the rest within its rounding."""

import pytest
import torch

from tpvc.compiler.adapters.road import Rotation
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, QTensor
from tpvc.kernels.aot import compile_all, gate, variant_of
from tpvc.kernels.linear import Bank, Config
from tpvc.kernels.linear_a8 import configs, linear_a8, linear_a8_reference
from tpvc.kernels.round_rows import Rows, round_rows, round_rows_reference
from tpvc.kernels.slab import dequantise, length, pack
from tpvc.kernels.targets import named

EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


def matrix(out, depth, bits, group, symmetric, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, group, symmetric)
    codes = torch.randint(0, 2**bits, (out, depth), generator=generator).to(torch.uint8)
    groups = (out, depth // grid.columns(depth))
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


def rows_of(count, depth, kind, dtype=torch.float16, seed=0):
    x = torch.randn(count, depth, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return round_rows_reference(x, kind=kind)


def compare(found, x, weight, bias=None, bank=None, ids=None):
    """Sums of K products in float32 are off by at most K eps of the sum of their sizes; see test_linear."""
    wanted = linear_a8_reference(x, weight, bias, bank, ids)
    dense = x.codes.double() * x.scale[:, None].double()
    size = (dense.abs() @ dequantise(weight, torch.float32).double().abs().T).max()
    size += 0 if bias is None else bias.double().abs().max()
    if bank is not None:
        size *= 2 * max(float(bank.cosine.abs().max()), float(bank.sine.abs().max()), 1)
    limit = (weight.depth + 4) * 2**-24 * float(size) * 2 + 2 * EPS[x.dtype] * float(wanted.double().abs().max())
    assert found.dtype == x.dtype and found.shape == wanted.shape
    assert (found.double() - wanted.double()).abs().max() <= limit
    assert limit < 0.03 * float(size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 17])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_sums_of_integers_are_exact(bits, rows, symmetric):
    """One scale a channel: an integer, scaled by two numbers and rounded, whatever the order. The depth ends inside the
    first slab of the last pair."""
    weight = matrix(72, 2 * length(weight_bits(bits)) + 40, bits, -1, symmetric, torch.float16)
    x = rows_of(rows, weight.depth, "int8", torch.bfloat16 if rows == 4 else torch.float16, seed=rows)
    bias = torch.randn(72).to(x.dtype) if rows != 4 else None
    assert torch.equal(linear_a8(x, weight, bias, config=Config(16, 64, 1, 4, 2)), linear_a8_reference(x, weight, bias))


def weight_bits(bits):
    return bits if bits <= 4 else 8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_scales_by_group(bits, group, symmetric):
    weight = matrix(40, 384, bits, group, symmetric, torch.float16)
    x = rows_of(2, 384, "int8", torch.float32, seed=3)
    compare(linear_a8(x, weight), x, weight)


@pytest.mark.parametrize("group", [-1, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fp8(bits, group):
    weight = matrix(72, 320, bits, group, bits == 2, torch.float16)
    x = rows_of(3, 320, "fp8", torch.float32, seed=4)
    compare(linear_a8(x, weight), x, weight)


@pytest.mark.parametrize("kind,bits", [("int8", 8), ("int8", 4), ("fp8", 4)])
@pytest.mark.parametrize("group", [-1, 64])
@pytest.mark.parametrize("split", [1, 2, 4])
def test_partial_sums_rotate_after_they_are_added(split, group, kind, bits):
    """Rows with their own adapters, -1 among them."""
    weight = matrix(128, 512, bits, group, False, torch.float16)
    x = rows_of(6, 512, kind, torch.float32, seed=5)
    bias, bank = torch.randn(128), bank_of(128, 3, 32, torch.float32)
    ids = (torch.arange(6) % 4 - 1).to(torch.int32)
    config = Config(16, 64, split, 4, 2)
    found = linear_a8(x, weight, bias, bank, ids, config=config)
    compare(found, x, weight, bias, bank, ids)
    plain = linear_a8(x, weight, bias, config=config)
    compare(plain, x, weight, bias)
    assert torch.equal(found[ids < 0], plain[ids < 0])
    assert not torch.allclose(found[ids >= 0], plain[ids >= 0], rtol=0.1)


def test_the_same_call_gives_the_same_bits_and_configs_agree():
    weight = matrix(96, 2048, 4, -1, False, torch.float16)
    x = rows_of(3, 2048, "int8", seed=6)
    assert torch.equal(linear_a8(x, weight), linear_a8(x, weight))
    chosen = configs(3, weight, None)
    assert len(chosen) == len(set(chosen)) > 1 and chosen[0].split > 1
    for config in chosen:
        compare(linear_a8(x, weight, config=config), x, weight)


def test_it_is_the_linear_on_what_the_rows_stand_for():
    """Against a product of floats: the integers and scales are what `dequantise` says."""
    weight = matrix(40, 256, 4, 64, False, torch.float32)
    x = rows_of(4, 256, "int8", torch.float32, seed=7)
    dense = (x.codes.double() * x.scale[:, None].double()) @ dequantise(weight, torch.float32).double().T
    # four partial sums, each rounded and scaled: 8 eps of the sum of sizes, and the weights are rounded once
    size = (x.codes.double().abs() * x.scale[:, None]) @ dequantise(weight, torch.float32).double().abs().T
    assert bool(((linear_a8_reference(x, weight).double() - dense).abs() <= 10 * 2**-24 * size).all())


def test_tiles_own_whole_groups():
    weight = matrix(512, 128, 4, -1, False, torch.float16)
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for config in configs(rows, weight, 256):
            assert config.block_n % 256 == 0 and config.block_m >= 16 and config.block_m & (config.block_m - 1) == 0


def test_what_does_not_belong_together_is_refused():
    weight, x = matrix(64, 64, 4, -1, True, torch.float16), rows_of(2, 64, "int8")

    def refused(*args):
        with pytest.raises(TpvcError) as error:
            linear_a8(*args)
        return str(error.value)

    assert "codes of activations are [2, 32]; expected contiguous rows of 64" in refused(rows_of(2, 32, "int8"), weight)
    assert "scales of activations are [1]" in refused(Rows(x.codes, x.scale[:1], x.dtype), weight)
    assert "rows rounded to fp8 and weights of 8 bits; expected at most 4" in refused(
        rows_of(2, 64, "fp8"), matrix(64, 64, 8, -1, True, x.dtype)
    )
    assert "groups of 16 columns; expected a multiple of 32" in refused(x, matrix(64, 64, 4, 16, True, x.dtype))
    assert "the bias has shape [3]" in refused(x, weight, torch.zeros(3))
    assert "come together" in refused(x, weight, None, bank_of(64, 1, 32, x.dtype))
    assert "expected [adapters, 64]" in refused(
        x, weight, None, Bank(torch.zeros(1, 32), torch.zeros(1, 32), 32), torch.zeros(2, dtype=torch.int32)
    )


@pytest.mark.slow
def test_compiles(compiles):
    launches = []
    for rows, bits, group in (
        (1, 8, -1),
        (16, 4, -1),
        (16, 4, 128),
        (64, 8, -1),
        (128, 8, -1),
        (16, 3, -1),
        (16, 8, 64),
    ):
        weight = matrix(256, 1024, bits, group, bits == 8 and group == -1, torch.float16)
        x = rows_of(rows, 1024, "int8", seed=0)
        linear_a8(x, weight, run=launches.append)
    bank, ids = bank_of(256, 2, 64, torch.float16), torch.zeros(rows, dtype=torch.int32)
    linear_a8(x, weight, None, bank, ids, run=launches.append)
    compiles(launches)


@pytest.mark.slow
def test_fp8_compiles_where_the_table_says():
    """On matrix units and within their limits; sm_80, and so PTX, has no such type."""
    x, weight = rows_of(16, 1024, "fp8"), matrix(256, 1024, 4, 128, True, torch.float16)
    launches = []
    linear_a8(x, weight, run=launches.append)
    round_rows(torch.zeros(2, 1024, dtype=torch.float16), kind="fp8", run=launches.append)
    targets = [named(name) for name in ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "hip:gfx950")]
    assert [t.fp8 for t in targets] == [False, True, True, True, True]
    for target in targets:
        found = compile_all([(variant_of(launch), target) for launch in launches if launch.kernel != "linear:merge"])
        if not target.fp8:
            assert all("fp8e4nv not supported" in reason for reason in found)
            continue
        assert not any(isinstance(f, str) or gate(f, target) for f in found), found
        assert found[0].resources.tensor >= found[0].resources.products > 0
