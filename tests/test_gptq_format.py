"""GPTQ's tensors: there and back bit for bit, and word by word what the format says."""

import pytest
import torch

from tpvc.compiler.gptq_format import BITS, VERSIONS, entries, from_tensors, to_tensors
from tpvc.compiler.program import Grid, QTensor

N, K = 32, 64


def random_codes(grid, lowest=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = (1, 1) if grid.group == 0 else (N, K // grid.columns(K))
    codes = torch.randint(0, 2**grid.bits, (N, K), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(groups, generator=generator) - 0.5).half().float()
    zero = torch.randint(lowest, 2**grid.bits, groups, generator=generator).to(torch.uint8)
    return QTensor(codes, scale, None if grid.symmetric else zero, grid, torch.float16)


@pytest.mark.parametrize("version", VERSIONS.values())
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [-1, 0, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip(version, bits, group, symmetric):
    q = random_codes(Grid(bits, group, symmetric), lowest=2 - version)
    tensors = to_tensors(q, version, torch.float16)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert found == entries((N, K), bits, q.grid.columns(K), torch.float16)
    codes, scale, zero = from_tensors(tensors, bits, K, version)
    assert torch.equal(codes, q.codes) and torch.equal(scale, q.scale.expand_as(scale))
    assert torch.equal(zero, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else q.zero.expand_as(zero))


def test_words():
    """Symmetric zero points of 4 bits are 7 in version 1 and 8 in version 2; the first code lies in the lowest bits,
    and the eleventh of 3 bits across two words."""
    q = random_codes(Grid(4, 32, True))
    assert to_tensors(q, 1, torch.float16)["qzeros"].unique().tolist() == [0x77777777]
    assert to_tensors(q, 2, torch.float16)["qzeros"].unique().tolist() == [0x88888888 - 2**32]
    word = int(to_tensors(q, 1, torch.float16)["qweight"][1, 5])
    assert [(word >> 4 * i) & 15 for i in range(8)] == q.codes[5, 8:16].tolist()
    q = random_codes(Grid(3, -1, False))
    low, high = (int(w) & 0xFFFFFFFF for w in to_tensors(q, 2, torch.float16)["qweight"][:2, 7])
    assert (low >> 30 | high << 2) & 7 == int(q.codes[7, 10])
    assert to_tensors(q, 1, torch.float16)["g_idx"].tolist() == [0] * K
    assert to_tensors(random_codes(Grid(8, 16, True)), 1, torch.float16)["g_idx"].tolist() == [
        k // 16 for k in range(K)
    ]


def test_a_zero_point_of_0_that_borrowed_from_its_neighbour():
    """GPTQModel takes one from the whole word: 5, 0 becomes 0x.4 less 1 of the neighbour above."""
    whole = sum(z << 4 * i for i, z in enumerate([0, 5, 3, 0, 0, 15, 1, 8]))
    stored = (whole - 0x11111111) % 2**32
    tensors = {
        "qweight": torch.zeros(1, 8, dtype=torch.int32),
        "qzeros": torch.tensor([[stored - 2**32 if stored >= 2**31 else stored]], dtype=torch.int32),
        "scales": torch.ones(1, 8),
    }
    assert from_tensors(tensors, 4, 8, 1)[2][:, 0].tolist() == [0, 5, 3, 0, 0, 15, 1, 8]


def test_what_it_does_not_hold():
    q = random_codes(Grid(4, 32, False), lowest=0)
    with pytest.raises(ValueError, match="zero point is 0"):
        to_tensors(q, 1, torch.float16)
    fine = QTensor(q.codes, q.scale + 2.0**-20, q.zero, q.grid)
    with pytest.raises(ValueError, match="not exact"):
        to_tensors(fine, 2, torch.float16)
