import numpy as np
import pytest
import torch

from tpvc.compiler import packing
from tpvc.compiler.packing import pack, unpack, words


def codes_of(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(2**bits, (n, k), generator=torch.Generator().manual_seed(bits * k + n)).to(torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 64, 100, 200])
def test_unpack_inverts_pack(bits, columns):
    codes = codes_of(5, columns, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, words(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_lsb_first_bit_by_bit(bits):
    """Bit i of code j of a row is bit (j * bits + i) of the row's stream; the oracle expands every bit."""
    codes = codes_of(3, 37, bits).numpy()
    stream = ((codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1).reshape(3, -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    expected = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    assert np.array_equal(pack(torch.from_numpy(codes), bits).numpy(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [64, 50])
def test_equals_the_packer_of_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(6, columns, bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(helpers.unpack_from_int32(pack(codes, bits), bits, torch.Size((6, columns))), signed)


def test_rows_are_packed_in_chunks(monkeypatch):
    codes = codes_of(50, 40, 3)
    whole = pack(codes, 3)
    monkeypatch.setattr(packing, "_CHUNK", 90)
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 40), codes)


def test_views_and_empty_matrices():
    codes = codes_of(12, 20, 4)
    assert torch.equal(unpack(pack(codes.T, 4), 4, 12), codes.T)
    assert unpack(pack(codes[:0], 4), 4, 20).shape == (0, 20)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="does not fit in 2 bits"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"expected 1\.\.8"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack(torch.tensor([[4]]), 4)
    with pytest.raises(ValueError, match=r"expected int32 \[n, 2\]"):
        unpack(torch.zeros(3, 3, dtype=torch.int32), 4, 16)
