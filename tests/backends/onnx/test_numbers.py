"""What lies in both graphs of every family, read back as parameters: all of them, bit for bit."""

import pytest

from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.program import Grid
from tpvc.compiler.progress import silent
from tpvc.compiler.verification import matrices, onnx_numbers

HEAD = Grid(8, -1, True)
GRIDS = {
    "float": (None, None),
    "w4": (Grid(4, 16, False), HEAD),
    "w3": (Grid(3, 8, True), HEAD),
    "w5": (Grid(5, -1, False), None),
    "w2": (Grid(2, 0, True), Grid(6, 8, False)),
}


def check(program, folder):
    for graph in (folder, folder / "portable"):
        count = matrices.compare(program, onnx_numbers.read(graph, program), "onnx", "the model", silent)
        assert count.integers + count.floats == len(matrices.names(program)) and not count.rounded
    return count


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_every_parameter_comes_back(tiny, family, grids, tmp_path):
    program = tiny.build(family, *grids)
    emit(program, tmp_path, None, portable=True)
    assert bool(check(program, tmp_path).integers) == (grids[0] is not None)
