"""What lies in the files: every integer, the operators, the data layout, and the config."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import torch
from onnx import numpy_helper

from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.backends.onnx.matmulnbits import Packed, from_bits, layout_of, unpack
from tpvc.compiler.program import Grid, linears

BITS = (Grid(4, 32, False), Grid(8, -1, True))


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def matrices(directory):
    """{name of the Program's node: (MatMulNBits node, its arrays)}."""
    model = onnx.load(directory / "model.onnx")
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = (n for n in model.graph.node if n.op_type == "MatMulNBits")
    return {n.name.split("/")[0]: (n, [arrays.get(i) for i in n.input[1:]]) for n in nodes}


def written(arrays, grid, shape):
    codes, scales, *rest = arrays
    zeros = rest[0] if rest else None
    return unpack(Packed(codes, scales, zeros, layout_of(grid, shape[1])), grid)


@pytest.mark.parametrize(
    "grid", [Grid(4, 32, False), Grid(3, 48, True), Grid(5, 24, False), Grid(2, -1, True)], ids=str
)
def test_integers_come_back_bit_for_bit(family, grid, tiny, tmp_path):
    """Packed q|k|v hold the rows of the source in that order, also where the checkpoint interleaves heads."""
    if any(width % grid.columns(width) for width in inputs(tiny.build(family))):
        grid = replace(grid, group=8)
    program = tiny.build(family, grid, grid)
    emit(program, tmp_path, None)
    found = matrices(tmp_path)
    checked = set()
    for name, (node, arrays) in found.items():
        if name.endswith(".qkv"):
            expected = qkv_sources(program, name)
        else:
            (source,) = (n for n in linears(program.nodes) if n.name == name)
            expected = [(source, slice(None))]
        shape = (attributes(node)["N"], program.params[expected[0][0].params["weight"]].shape[1])
        back = written(arrays, grid, shape)
        for part in ("codes", "scale", "zero"):
            tensors = [(getattr(program.params[n.params["weight"]], part), rows) for n, rows in expected]
            if tensors[0][0] is None:
                assert back.zero is None
                continue
            assert torch.equal(getattr(back, part), torch.cat([t[rows] for t, rows in tensors]))
        checked |= {n.name for n, _ in expected}
    assert checked == {n.name for n in linears(program.nodes)}


def inputs(program):
    return [program.params[n.params["weight"]].shape[1] for n in linears(program.nodes)]


def qkv_sources(program, name):
    """[(linear, its rows)] of packed q, k and v, worked out from the nodes before the attention."""
    nodes = {n.name: n for n in program.nodes}
    parts = []
    for value in nodes[name.removesuffix(".qkv")].inputs[:3]:
        node = nodes[value]
        while node.op == "rope":
            node = nodes[node.inputs[0]]
        if node.op == "linear":
            parts.append((node, slice(None)))
            continue
        linear = nodes[node.inputs[0]]
        width = program.params[linear.params["weight"]].shape[0] // node.attrs["groups"]
        heads = range(node.attrs["groups"])
        runs = [range(h * width + node.attrs["start"], h * width + node.attrs["stop"]) for h in heads]
        parts.append((linear, [row for run in runs for row in run]))
    return parts


def test_no_slow_layout(family, tiny, tmp_path):
    """Level 4 on every integer product, uint8 zero points, no g_idx, and a fast kernel for every block."""
    for i, grid in enumerate((Grid(4, -1, False), Grid(2, -1, False), Grid(8, 0, True), Grid(3, 32, False))):
        if any(width % grid.columns(width) for width in inputs(tiny.build(family))):
            continue
        (tmp_path / str(i)).mkdir()
        emit(tiny.build(family, grid, grid), tmp_path / str(i), None)
        found = matrices(tmp_path / str(i))
        assert found
        for node, arrays in found.values():
            attrs = attributes(node)
            assert attrs["accuracy_level"] == 4
            assert attrs["block_size"] in ((32, 64, 128) if attrs["bits"] == 2 else (16, 32, 64, 128))
            assert len(node.input) < 4 or not node.input[3] or arrays[2].dtype == np.uint8
            assert len(node.input) < 5 or not node.input[4]


def test_a_tied_head_lies_in_the_file_once(tiny, tmp_path):
    program = tiny.build("llama", *BITS)
    emit(program, tmp_path, None)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    where = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    codes, rows = where["model.embed_tokens.weight.codes"], where["model.embed_tokens.weight.codes.rows"]
    assert codes == rows
    (gather,) = (n for n in model.graph.node if n.op_type == "GatherBlockQuantized")
    (head,) = (n for n in model.graph.node if n.op_type == "MatMulNBits" and n.name.startswith("lm_head"))
    assert gather.input[2:] == head.input[2:]


def test_data_is_external_and_aligned(tiny, tmp_path):
    program = tiny.build("opt", *BITS)
    emit(program, tmp_path, None, portable=True)
    for directory in (tmp_path, tmp_path / "portable"):
        model = onnx.load(directory / "model.onnx", load_external_data=False)
        assert model.ir_version == 10
        for tensor in model.graph.initializer:
            place = {e.key: e.value for e in tensor.external_data}
            assert place or tensor.ByteSize() < 256
            if place:
                assert place["location"] == "model.onnx.data"
                assert int(place["offset"]) % (4096 if int(place["length"]) >= 4096 else 64) == 0
        assert (directory / "model.onnx").stat().st_size < 100_000


def test_portable_codes_are_stored_by_input_feature(tiny, tmp_path):
    """DequantizeLinear of [K, N]: int4 without zero points when symmetric, uint4 with them otherwise."""
    for symmetric, kind in ((True, onnx.TensorProto.INT4), (False, onnx.TensorProto.UINT4)):
        directory = tmp_path / str(symmetric)
        directory.mkdir()
        program = tiny.build("qwen3", Grid(3, 32, symmetric))
        emit(program, directory, None, portable=True)
        model = onnx.load(directory / "portable" / "model.onnx")
        tensors = {t.name: t for t in model.graph.initializer}
        for node in linears(program.nodes):
            if node.block is None:
                continue
            name = node.params["weight"]
            tensor, source = tensors[f"{name}.codes"], program.params[name]
            assert tensor.data_type == kind
            codes = from_bits(np.frombuffer(tensor.raw_data, np.uint8)[None], 4, source.codes.numel())
            codes = codes.reshape(source.shape[::-1]).T.astype(np.int16)
            if symmetric:
                codes = (codes ^ 8) - 8 + 4
            assert np.array_equal(codes, source.codes.numpy())
            assert (f"{name}.zeros" in tensors) != symmetric


def test_config(tiny, tmp_path):
    program = tiny.build("gpt_neox", *BITS)
    emit(program, tmp_path, None)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert config["model"]["type"] == "decoder"
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == ([2], 0)
    assert (config["model"]["vocab_size"], config["model"]["context_length"]) == (97, 64)
    assert (decoder["head_size"], decoder["num_attention_heads"], decoder["num_hidden_layers"]) == (64, 3, 2)
    assert config["search"]["past_present_share_buffer"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["genai_config.json", "model.onnx", "model.onnx.data"]


def test_heads_that_the_fused_attention_does_not_take(tiny, tmp_path):
    """Heads of 12 features: attention in standard operators, and a cache that grows."""
    emit(tiny.build("llama-odd-heads", Grid(4, 16, True)), tmp_path, None)
    kinds = {n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node}
    assert "GroupQueryAttention" not in kinds and "MatMulNBits" in kinds
    assert json.loads((tmp_path / "genai_config.json").read_text())["search"]["past_present_share_buffer"] is False


def test_a_model_without_special_tokens_loads(tiny, tmp_path):
    program = tiny.build("llama", *BITS)
    program = replace(program, facts=replace(program.facts, bos=None, eos=(), pad=None))
    emit(program, tmp_path, None)
    og.Model(str(tmp_path))
