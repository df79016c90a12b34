"""What has no exact lowering is refused by the node's name, before any file is written."""

from dataclasses import replace

import pytest

from tpvc.compiler.adapters.road import Road, identity
from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.backends.onnx.genai import GENAI
from tpvc.compiler.backends.onnx.standard import STANDARD
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import Grid, Node
from tpvc.passes.bank_road import BankRoad


def test_every_op_is_lowered_by_both_graphs():
    assert set(GENAI) == set(STANDARD) == set(OPS) - {"round_heads"}  # taken out before


def changed(program, name, **fields):
    return replace(program, nodes=tuple(replace(n, **fields) if n.name == name else n for n in program.nodes))


def refused(program, directory, text, **options):
    with pytest.raises(TpvcError, match=text):
        emit(program, directory, None, **options)
    assert not list(directory.iterdir())


def test_unknown_op(tiny, tmp_path):
    refused(changed(tiny.build("llama"), "model.norm", op="twist"), tmp_path, r"'model\.norm' \(twist\)")


def test_quantised_parameter_of_a_norm(tiny, tmp_path):
    program = tiny.build("llama", Grid(4, 32, True))
    odd = changed(program, "model.norm", params={"weight": "model.layers.0.self_attn.q_proj.weight"})
    refused(odd, tmp_path, r"'model\.norm'.*is quantised")


def test_attention_over_another_mask(tiny, tmp_path):
    program = tiny.build("llama")
    name = "model.layers.0.self_attn.attention"
    (node,) = (n for n in program.nodes if n.name == name)
    refused(
        changed(program, name, inputs=(*node.inputs[:3], "positions")), tmp_path, "expected the program's own 'mask'"
    )


def test_mask_read_by_another_op(tiny, tmp_path):
    program = tiny.build("llama")
    nodes = (*program.nodes, Node("odd", "add", ("lm_head", "mask")))
    refused(replace(program, nodes=nodes), tmp_path, "'odd'.*only attention may")


def test_layers_with_different_caches(tiny, tmp_path):
    program = tiny.build("opt")
    name = "model.decoder.layers.0.self_attn.attention"
    (node,) = (n for n in program.nodes if n.name == name)
    refused(changed(program, name, attrs={**node.attrs, "heads": 2, "kv_heads": 2}), tmp_path, "one cache shape")


def banked(program, name="task"):
    return BankRoad((Road(name, {"model.layers.0.self_attn.k_proj": identity("road_1", 2, 96)}),))(program)


def test_rotation_by_other_ids(tiny, tmp_path):
    name = "model.layers.0.self_attn.k_proj"
    program = banked(tiny.build("llama"))
    odd = changed(program, f"{name}.rotate", inputs=(name, "input_ids"))
    refused(odd, tmp_path, "expected the program's own 'adapter_ids'")
    nodes = (*program.nodes, Node("odd", "add", ("lm_head", "adapter_ids")))
    refused(replace(program, nodes=nodes), tmp_path, "'odd'.*only rotate may")


def test_rotation_without_its_adapters(tiny, tmp_path):
    refused(replace(banked(tiny.build("llama")), adapters=()), tmp_path, "rows for 1 of 0 adapters")


@pytest.mark.parametrize("name", ["..", "a/b", "", "a\n", "c:d"])
def test_adapter_whose_name_is_no_file_name(name, tiny, tmp_path):
    refused(banked(tiny.build("llama"), name), tmp_path, "expected a name of letters")


@pytest.mark.parametrize("level", [2, 3, 5])
def test_accuracy_level(level, tiny, tmp_path):
    refused(tiny.build("llama"), tmp_path, f"accuracy level {level}", accuracy_level=level)
