"""Bytes of weights: counted by hand, and those that lie in files."""

import torch

import tpvc
from tpvc.compiler import frontends
from tpvc.compiler.program import Grid, read
from tpvc.compiler.weight_bytes import matrix_bits, parameter_bytes, weight_bytes
from tpvc.passes.round_to_nearest import quantize


def test_codes_scales_and_zero_points_count():
    """64 weights of 3 bits, with a float16 scale and a zero point of 3 bits for every 16 of them."""
    assert matrix_bits((2, 32), Grid(3, 16, False), torch.float16) == 64 * 3 + 4 * (16 + 3)
    assert matrix_bits((2, 32), Grid(3, 16, True), torch.float32) == 64 * 3 + 4 * 32
    assert matrix_bits((2, 32), Grid(3, -1, True), torch.float16) == 64 * 3 + 2 * 16
    assert matrix_bits((2, 32), Grid(3, 0, True), torch.float16) == 64 * 3 + 16


def test_scales_are_as_wide_as_they_are():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.float32):
        assert parameter_bytes(quantize(weight, Grid(4, 32, True), dtype)) == 4 * 32 + 4 * 2 * dtype.itemsize
    assert parameter_bytes(weight) == 4 * 64 * 4


def test_lazy_or_read_a_parameter_has_the_same_bytes(tiny_llama, tmp_path):
    tpvc.quantize(tiny_llama, tmp_path / "w4", method="rtn", bits=4, group=32)
    program = frontends.load(tmp_path / "w4")
    assert all(parameter_bytes(p) == parameter_bytes(read(p)) for p in program.params.values())
    assert weight_bytes(program) == sum(f.stat().st_size for f in (tmp_path / "w4").glob("*.safetensors"))
    float_bytes = sum(map(parameter_bytes, frontends.load(tiny_llama).params.values()))
    assert 0 < weight_bytes(frontends.load(tiny_llama)) - float_bytes < 8192  # the header
