"""8-bit logarithmic codes: how far off they are, and what becomes 0."""

import pytest
import torch

from tpvc.compiler.tuning.log_codes import encode


def test_a_number_is_off_by_half_a_step_at_most():
    values = torch.logspace(-9, 3, 5000)
    values = values[values >= values.max() * 2**-31.75]
    ratio = encode(values).dense.double() / values.double()
    # half a step, and the rounding of the table to float32
    assert float(ratio.log2().abs().max()) <= 1 / 16 + 2**-22
    assert float(encode(values).dense[-1]) == float(values[-1])


def test_what_is_read_is_written_again_bit_for_bit():
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(40, 30, generator=draw).pow(20) * 1e7
    once = encode(values)
    again = encode(once.dense)
    assert torch.equal(once.codes, again.codes) and torch.equal(once.dense, again.dense)
    assert once.codes.dtype == torch.uint8 and once.codes.shape == values.shape


def test_zero_stays_zero_and_what_is_far_below_the_top_becomes_it():
    found = encode(torch.tensor([0.0, 1.0, 2**-31.75, 2**-33.0])).dense
    assert found.tolist() == [0, 1, pytest.approx(2**-31.75, rel=2**-22), 0]
    assert not encode(torch.zeros(3, 2)).dense.any() and encode(torch.zeros(3, 2)).codes.shape == (3, 2)
