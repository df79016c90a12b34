"""Packing is exact and has an inverse, whatever the width and the group; the layouts are those with a fast kernel."""

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tpvc.compiler.backends.onnx.matmulnbits import BLOCKS, CONTAINER, from_bits, layout_of, pack, to_bits, unpack
from tpvc.compiler.program import Grid, QTensor

ROWS, COLUMNS = 10, 192
GRIDS = [
    Grid(bits, group, symmetric)
    for bits, group, symmetric in itertools.product(range(2, 9), (16, 32, 48, 64, 96, 24, 12, 3, -1, 0), (True, False))
]


def random_codes(grid, columns=COLUMNS):
    generator = torch.Generator().manual_seed(grid.bits * 1000 + grid.group)
    runs = columns // grid.columns(columns)
    shape = (1, 1) if grid.group == 0 else (ROWS, runs)

    def draw(shape):
        return torch.randint(0, 2**grid.bits, shape, generator=generator, dtype=torch.uint8)

    scale = torch.randn(shape, generator=generator)
    return QTensor(draw((ROWS, columns)), scale, None if grid.symmetric else draw(shape), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_round_trip_is_bit_exact(grid):
    q = random_codes(grid)
    packed = pack(q)
    back = unpack(packed, grid)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale.expand(back.scale.shape))
    assert (back.zero is None) == (q.zero is None)
    assert q.zero is None or torch.equal(back.zero, q.zero.expand(back.zero.shape))
    assert packed.layout.bits in (2, 4, 8) and packed.layout.bits >= CONTAINER[grid.bits]
    assert packed.layout.block in BLOCKS
    assert packed.layout.bits > 2 or packed.layout.block >= 32


@pytest.mark.parametrize("columns", [50, 100, 576])
def test_a_row_with_one_scale_may_be_ragged(columns):
    q = random_codes(Grid(4, -1, False), columns)
    packed = pack(q)
    assert packed.layout.columns == columns and not packed.layout.spreads
    assert torch.equal(unpack(packed, q.grid).codes, q.codes)


@pytest.mark.parametrize(
    ("grid", "columns", "bits", "block", "padded"),
    [
        (Grid(4, 32, True), 192, 4, 32, 32),
        (Grid(4, 48, True), 192, 4, 16, 48),
        (Grid(4, 256, True), 512, 4, 128, 256),
        (Grid(2, 48, True), 192, 4, 16, 48),  # 2 bits have no fast kernel for blocks of 16
        (Grid(2, 64, True), 192, 2, 64, 64),
        (Grid(3, 64, False), 192, 4, 64, 64),
        (Grid(4, 12, False), 192, 4, 16, 16),
        (Grid(4, 24, False), 192, 4, 32, 32),
        (Grid(4, -1, False), 576, 4, 64, 576),  # 5 blocks of 128 would take more bytes than 9 of 64
        (Grid(8, -1, True), 512, 8, 64, 512),
        (Grid(6, 0, True), 1536, 8, 64, 1536),
    ],
    ids=str,
)
def test_layouts(grid, columns, bits, block, padded):
    layout = layout_of(grid, columns)
    assert (layout.bits, layout.block, layout.padded) == (bits, block, padded)


def test_zero_points_in_the_middle_are_dropped():
    q = random_codes(Grid(4, 32, False))
    middle = QTensor(q.codes, q.scale, torch.full_like(q.zero, 8), q.grid)
    packed = pack(middle)
    assert packed.zeros is None
    assert torch.equal(unpack(packed, q.grid).zero, middle.zero)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_bits(bits, columns):
    values = np.random.default_rng(0).integers(0, 2**bits, (5, columns), dtype=np.uint8)
    packed = to_bits(values, bits)
    assert packed.shape == (5, -(-columns * bits // 8))
    assert packed[0, 0] & (2**bits - 1) == values[0, 0]
    assert np.array_equal(from_bits(packed, bits, columns), values)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.group in (16, 48, 64, -1, 0)], ids=str)
def test_the_operator_reads_it_as_the_reference_does(grid):
    """`x @ dequantised.T` by MatMulNBits in float32. A sum of K terms is off by at most K u of the sum of sizes."""
    q = random_codes(grid)
    packed = pack(q)
    layout = packed.layout
    x = np.random.default_rng(1).standard_normal((3, layout.columns), dtype=np.float32)
    arrays = [packed.codes, packed.scales] + ([] if packed.zeros is None else [packed.zeros])
    values = [ir.Value(name=f"i{i}", const_value=ir.tensor(a, name=f"i{i}")) for i, a in enumerate(arrays)]
    float32 = ir.TensorType(ir.DataType.FLOAT)
    source = ir.Value(name="x", type=float32, shape=ir.Shape(("m", layout.columns)))
    attrs = {"K": layout.columns, "N": ROWS, "bits": layout.bits, "block_size": layout.block, "accuracy_level": 0}
    node = ir.node("MatMulNBits", [source, *values], attrs, domain="com.microsoft")
    out = node.outputs[0]
    out.name, out.type, out.shape = "y", float32, ir.Shape(("m", ROWS))
    domains = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([source], [out], nodes=[node], initializers=values, opset_imports=domains, name="one")
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    got = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    weight = q.dequantize().expand(ROWS, -1).double().numpy()
    bound = COLUMNS * 2**-24 * (np.abs(x).astype(np.float64) @ np.abs(weight).T)
    assert (np.abs(got - x.astype(np.float64) @ weight.T) <= bound + 1e-30).all()
