"""Rounded activations in both graphs, against the interpreter."""

from dataclasses import replace

import onnx
import pytest
import torch

from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.interpret import in_memory, logits
from tpvc.compiler.program import Grid
from tpvc.passes.round_activations import RoundActivations

PROMPT = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(1))
KINDS = {"int8": (Grid(8, -1, True), 127), "fp8": (Grid(4, -1, False), 16)}


def rms(x):
    return float(x.square().mean().sqrt())


def allowance(tolerance, rounded, plain, steps):
    """Two right evaluations differ by `tolerance` before they round. Where a value lies that near to an edge, which is
    a share of 2 * steps * tolerance of all, relative to the largest, they may go to both sides of it: one step, while
    rounding costs all of them step / sqrt(12) (rms). What this costs is the difference of `rounded` and `plain`."""
    share = 2 * steps * tolerance / float(rounded.abs().max())
    assert share < 0.01
    return tolerance + (12 * share) ** 0.5 * rms(rounded - plain)


@pytest.mark.parametrize("kind", KINDS)
def test_both_graphs(family, kind, tiny, tmp_path):
    grid, steps = KINDS[kind]
    plain = tiny.build(family, grid, Grid(8, -1, True))
    program = RoundActivations(kind)(plain)
    emit(program, tmp_path, None, accuracy_level=0, portable=True, all_logits=True)
    expected = logits(program, PROMPT, weight=in_memory(program))
    without = logits(plain, PROMPT, weight=in_memory(plain))
    limit = allowance(tiny.tolerance(expected), expected, without, steps)
    assert limit < rms(expected - without) / 2
    for directory in (tmp_path, tmp_path / "portable"):
        got, _ = tiny.step(tiny.session(directory), PROMPT, torch.ones(1, 12))
        assert rms(got - expected) <= limit


@pytest.mark.parametrize("portable", [False, True])
def test_on_one_grid_for_all_tokens(family, portable, tiny, tmp_path):
    """QuantizeLinear and DequantizeLinear, in both graphs."""
    plain = tiny.build(family, KINDS["int8"][0], Grid(8, -1, True))
    made = RoundActivations("int8-static")(plain)
    grids = {
        n.name: (0.01 + 0.005 * i, i % 7 - 3) for i, n in enumerate(n for n in made.nodes if n.op == "round_tensor")
    }
    told = (
        dict(zip(("scale", "zero"), grids[n.name], strict=True)) if n.name in grids else n.attrs for n in made.nodes
    )
    program = replace(made, nodes=tuple(replace(n, attrs=a) for n, a in zip(made.nodes, told, strict=True)))
    emit(program, tmp_path, None, accuracy_level=0, portable=True, all_logits=True)
    expected = logits(program, PROMPT, weight=in_memory(program))
    without = logits(plain, PROMPT, weight=in_memory(plain))
    limit = allowance(tiny.tolerance(expected), expected, without, 127)
    got, _ = tiny.step(tiny.session(tmp_path / "portable" if portable else tmp_path), PROMPT, torch.ones(1, 12))
    assert rms(got - expected) <= limit
    proto = onnx.load((tmp_path / "portable" if portable else tmp_path) / "model.onnx", load_external_data=False)
    assert sum(n.op_type == "QuantizeLinear" for n in proto.graph.node) == len(grids)
    # DequantizeLinear on both sides of a product: integers are multiplied, and uint8 * int8 overflow without VNNI
    kind = {t.name: t.data_type for t in proto.graph.initializer}
    made_by = {n.output[0]: n for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    products = [[made_by.get(i) for i in n.input] for n in proto.graph.node if n.op_type == "MatMul"]
    codes = [kind[b.input[0]] for a, b in products if a is not None and b is not None]
    assert codes == [onnx.TensorProto.UINT8] * len(codes) and bool(codes) == portable


def test_it_stays_in_standard_operators(tiny, tmp_path):
    program = RoundActivations("fp8")(tiny.build("llama", Grid(4, 32, True)))
    emit(program, tmp_path, None, portable=True)
    proto = onnx.load(tmp_path / "portable" / "model.onnx", load_external_data=False)
    assert {n.domain for n in proto.graph.node} == {""}
    onnx.checker.check_model(tmp_path / "portable" / "model.onnx")
    counts = [sum(n.op_type == "ReduceMax" for n in proto.graph.node)]
    fast = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    counts.append(sum(n.op_type == "ReduceMax" for n in fast.graph.node))
    assert counts == [sum(n.op == "round_rows" for n in program.nodes)] * 2
    # q, k and v still come from one matrix
    assert sum(n.op_type == "MatMulNBits" for n in fast.graph.node) == program.blocks * 5
