"""Parts of fused projections under Triton's interpreter, bit for bit."""

import pytest
import torch

from tpvc.compiler import ops
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.split import split, split_reference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows,width,groups,start,stop", [(1, 3, 1, 1, 2), (3, 96, 4, 8, 16), (2, 3300, 1, 1100, 3300)])
def test_every_shape(rows, width, groups, start, stop, dtype):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = ops.split(x, groups=groups, start=start, stop=stop)
    assert torch.equal(split(x, groups, start, stop), wanted)
    assert torch.equal(split_reference(x, groups, start, stop), wanted)


def test_what_the_rows_do_not_have_is_refused():
    x = torch.zeros(2, 12)
    for given in ((5, 0, 1), (3, 2, 5), (3, 2, 2)):
        with pytest.raises(TpvcError, match="of rows of 12"):
            split(x, *given)
    with pytest.raises(TpvcError, match="expected contiguous rows"):
        split(x.T, 1, 0, 1)


@pytest.mark.slow
def test_compiles(compiles):
    launches = []
    split(torch.zeros(2, 6144).half(), 8, 0, 128, run=launches.append)
    compiles(launches)
