"""AWQ's tensors: there and back bit for bit, and nibble by nibble what the format says."""

import pytest
import torch

from tpvc.compiler.awq_format import entries, from_tensors, to_tensors
from tpvc.compiler.program import Grid, QTensor

N, K = 24, 64
ROW_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def random_codes(grid):
    generator = torch.Generator().manual_seed(0)
    groups = (1, 1) if grid.group == 0 else (N, K // grid.columns(K))
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    scale = torch.rand(groups, generator=generator).half().float()
    zero = torch.randint(0, 16, groups, generator=generator).to(torch.uint8)
    return QTensor(codes, scale, None if grid.symmetric else zero, grid, torch.float16)


@pytest.mark.parametrize("group", [-1, 0, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip(group, symmetric):
    q = random_codes(Grid(4, group, symmetric))
    tensors = to_tensors(q, torch.float16)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert found == entries((N, K), q.grid.columns(K), torch.float16)
    codes, scale, zero = from_tensors(tensors)
    assert torch.equal(codes, q.codes) and torch.equal(scale, q.scale.expand_as(scale))
    assert torch.equal(zero, torch.full_like(zero, 8) if symmetric else q.zero.expand_as(zero))


def test_nibbles():
    q = random_codes(Grid(4, 32, False))
    tensors = to_tensors(q, torch.float16)
    for k, word in ((0, 0), (41, 2)):
        found = int(tensors["qweight"][k, word])
        assert [(found >> 4 * i) & 15 for i in range(8)] == [int(q.codes[8 * word + r, k]) for r in ROW_OF_NIBBLE]
    found = int(tensors["qzeros"][1, 1])
    assert [(found >> 4 * i) & 15 for i in range(8)] == [int(q.zero[8 + r, 1]) for r in ROW_OF_NIBBLE]


def test_scales_are_kept():
    q = random_codes(Grid(4, 32, False))
    with pytest.raises(ValueError, match="not exact"):
        to_tensors(QTensor(q.codes, q.scale + 2.0**-20, q.zero, q.grid), torch.float16)
