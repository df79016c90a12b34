"""`verify`: every format of one model agrees, a flipped bit in any of them is found and named."""

import json
import shutil
from dataclasses import replace

import onnx_ir as ir
import pytest
import torch

import tpvc
from tpvc.compiler import frontends, interpret
from tpvc.compiler.backends import onnx, triton
from tpvc.compiler.backends.huggingface import emit
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, dense, linears
from tpvc.compiler.verification import check_written, verify
from tpvc.compiler.verification.logits import Expected
from tpvc.compiler.verification.matrices import check_same
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.round_to_nearest import quantize

UP = "model.layers.1.mlp.up_proj"


def refused(targets, said, **options):
    with pytest.raises(TpvcError, match=said):
        verify(targets, **options)


@pytest.fixture
def copy(made, tmp_path):
    return lambda name: shutil.copytree(made[name], tmp_path / name)


def test_every_format_agrees(made):
    formats = [name for name in made if name != "program"]
    found = verify([made[name] for name in formats])
    told = {(f.target.rpartition("/")[2], f.subject): f for f in found}
    assert all(told[name, "files"].proven and told[name, "numbers"].proven for name in formats)
    assert {name for name in formats if told[name, "logits"].proven} == {"transformers", "onnx", "triton"}
    assert told["gptq", "logits"].said == "transformers reads it through gptqmodel, which is not installed"
    assert "14 integer matrices, 6 float tensors, 1 integer matrix in float" in told["awq", "numbers"].said
    assert "15 integer matrices, 6 float tensors; in portable/: 15" in told["onnx", "numbers"].said
    assert [f.kind for f in found if f.subject == "files"] == [
        "compressed-tensors checkpoint",
        "compressed-tensors checkpoint",
        "GPTQ checkpoint",
        "GPTQ checkpoint",
        "AWQ checkpoint",
        "ONNX folder",
        "Triton package",
    ]
    graphs = [f.said for f in found if f.target == str(made["onnx"]) and f.subject == "logits"]
    assert len(graphs) == 2 and "portable/model.onnx" in graphs[1] and "not at accuracy level 4" in graphs[0]


def test_a_changed_file_is_found_by_its_hash(made, copy):
    folder = copy("onnx")
    path = folder / "portable" / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(bytes(data))
    refused([made["transformers"], folder], r"portable/model.onnx.data' has the SHA-256 .* tpvc.json says")
    path.unlink()
    refused([made["transformers"], folder], r"portable/model.onnx.data' is missing")


FLIPS = {
    "transformers": {"weight_packed": "code", "weight_zero_point": "zero point", "weight_scale": "scale"},
    "vllm": {"weight_packed": "code", "weight_zero_point": "zero point", "weight_scale": "scale"},
    "gptq": {"qweight": "code", "qzeros": "zero point", "scales": "scale"},
    "gptq_v2": {"qweight": "code", "qzeros": "zero point", "scales": "scale"},
    "awq": {"qweight": "code", "qzeros": "zero point", "scales": "scale"},
}
FLIPS = [(name, part, said) for name, parts in FLIPS.items() for part, said in parts.items()]


@pytest.mark.parametrize(("name", "part", "said"), FLIPS)
def test_a_flipped_bit_in_a_checkpoint(made, copy, flip, with_hashes, name, part, said):
    folder, other = copy(name), made["gptq" if name != "gptq" else "awq"]
    flip(folder, f"{UP}.{part}")
    refused([other, folder], r"model.safetensors' has the SHA-256")
    with_hashes(folder)
    place = "row 0, column 0" if said == "code" else r"row 0, group of 32 columns 0"
    refused([other, folder], rf"{name}' holds .* as the {said} of '{UP}.weight' at {place}; '{other}' holds")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("words", rf"the code of '{UP}.weight' at row 0, column 0;"),
        ("scale", rf"the scale of '{UP}.weight' at row 0, group of 32 columns 0;"),
        ("zero", rf"the zero point of '{UP}.weight' at row 0, group of 32 columns 0;"),
    ],
)
def test_a_flipped_bit_in_a_package(made, copy, flip, with_hashes, part, said):
    from tpvc.compiler.backends import triton

    folder, own = copy("triton"), f"{UP}.weight"
    (joined,) = [name for name in triton.read(folder).params if own in name.split("+")]
    rows = [triton.read(folder).params[joined].tensors[part].shape[1], made["program"].params[own].shape[0]]
    first = (rows[0] - rows[1]) * (joined.split("+")[-1] == own)  # it is the last of those side by side
    size = {"words": 4, "scale": 2, "zero": 1}[part]
    flip(folder, f"{joined}.{part}", first * size)
    with_hashes(folder)
    refused([made["transformers"], folder], said)


def change_data(folder, initializer, index=0):
    """Flip the lowest bit of a byte of an initializer, in the data file."""
    tensor = ir.load(folder / "model.onnx").graph.initializers[initializer].const_value
    path = folder / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[tensor.offset + index] ^= 1
    path.write_bytes(bytes(data))


ATTENTION = "model.layers.1.self_attn.attention.qkv"


@pytest.mark.parametrize(
    ("initializer", "index", "said"),
    [
        (f"{UP}.weight.codes", 0, rf"the code of '{UP}.weight' at row 0, column 0;"),
        (f"{UP}.weight.scales", 0, rf"the scale of '{UP}.weight' at row 0,"),
        (f"{UP}.weight.zeros", 0, rf"the zero point of '{UP}.weight' at row 0,"),
        (f"{ATTENTION}.codes", 32 * 65, r"the code of 'model.layers.1.self_attn.k_proj.weight' at row 1, column 0;"),
        ("lm_head.weight.codes", 5, r"the code of 'lm_head.weight' at row 0, column 5;"),
        ("model.norm.weight", 4, r"the value of 'model.norm.weight' at index 1;"),
    ],
)
def test_a_flipped_bit_in_onnx(made, copy, with_hashes, initializer, index, said):
    folder = copy("onnx")
    change_data(folder, initializer, index)
    with_hashes(folder)
    refused([made["transformers"], folder], rf"onnx/model.onnx' holds .* as {said}")


@pytest.mark.parametrize(
    ("part", "said"),
    [("codes", "the code of .* at row 0, column 0;"), ("scales", "the scale of"), ("zeros", "the zero point of")],
)
def test_a_flipped_bit_in_the_portable_twin(made, copy, with_hashes, part, said):
    folder = copy("onnx")
    change_data(folder / "portable", f"{UP}.weight.{part}")
    with_hashes(folder)
    refused([made["transformers"], folder], rf"portable/model.onnx' holds .* as {said}")


def test_bytes_that_meet_static_bytes_have_their_middle_as_zero_point(tiny_llama, tmp_path):
    program = frontends.load(tiny_llama)
    weights = [n.params["weight"] for n in linears(program.nodes) if n.block is not None]
    program = program.with_params({w: quantize(dense(program.params[w]), Grid(8, -1, True)) for w in weights})
    program = RoundActivations("int8-static")(program)
    told = {"scale": 0.02, "zero": 3}
    nodes = (replace(n, attrs=told) if n.op == "round_tensor" else n for n in program.nodes)
    program = replace(program, nodes=tuple(nodes))
    onnx.emit(program, tmp_path, None, portable=True)
    check_written(tmp_path, program)
    change_data(tmp_path / "portable", f"{UP}.weight.zeros")
    with pytest.raises(TpvcError, match=r"holds 129 in '.*up_proj.weight.zeros' at .*, where 128 is implied"):
        check_written(tmp_path, program)


def test_what_the_graph_computes_counts_too(made, copy, with_hashes):
    """A bit that is no parameter: epsilon of the last norm."""
    import onnx

    folder = copy("onnx")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(n for n in reversed(model.graph.node) if any(a.name == "epsilon" for a in n.attribute))
    next(a for a in node.attribute if a.name == "epsilon").f = 0.01
    onnx.save(model, folder / "model.onnx")
    with_hashes(folder)
    refused([made["transformers"], folder], r"ONNX Runtime .* computes from '.*onnx' the logit")
    assert all(f.proven for f in verify([made["transformers"], folder], logits=False) if f.subject == "numbers")


def test_a_graph_that_loads_and_does_not_run(made, copy, with_hashes):
    """The last reshape's shape is no number that is compared; values of another count do not fit it."""
    import numpy as np
    import onnx

    folder = copy("onnx")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    shapes = {t.name: t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT64}
    node = next(n for n in model.graph.node if any(name in shapes for name in n.input))
    tensor = shapes[next(name for name in node.input if name in shapes)]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(tensor.dims), 12345, np.int64), tensor.name))
    onnx.save(model, folder / "model.onnx")
    with_hashes(folder)
    refused([made["transformers"], folder], r"^ONNX Runtime cannot run '.*model\.onnx': .+$")


def test_a_layout_that_the_node_denies(made, copy):
    import onnx

    folder = copy("onnx")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if f"{UP}.weight.codes" in n.input)
    next(a for a in node.attribute if a.name == "block_size").i = 64
    onnx.save(model, folder / "model.onnx")
    (folder / "tpvc.json").unlink()
    refused([made["transformers"], folder], r"reads '.*up_proj.weight.codes' as \(bits, block\) \(4, 64\)")


def test_another_model(made, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "other")
    refused([made["gptq"], tmp_path / "other"], "of shape .* they are different models")
    sizes["num_hidden_layers"] = 1
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "one")
    refused([tmp_path / "other", tmp_path / "one"], "the models differ: only one has 'model.layers.1")
    refused([], "nothing was named")


@pytest.mark.parametrize(
    "grid", [Grid(4, 16, False), Grid(3, 32, False), Grid(4, -1, False), Grid(4, 32, True)], ids=str
)
def test_the_same_model_rounded_differently(made, tiny_llama, tmp_path, grid):
    program = frontends.load(tiny_llama)
    weights = [n.params["weight"] for n in linears(program.nodes) if n.block is not None]
    program = program.with_params({w: quantize(dense(program.params[w]), grid, torch.float16) for w in weights})
    program = program.with_params({"lm_head.weight": made["program"].params["lm_head.weight"]})
    for name in ("vllm", "onnx", "portable", "triton"):
        (tmp_path / name).mkdir()
    emit(program, tmp_path / "vllm", None, {}, runtime="vllm")
    onnx.emit(program, tmp_path / "onnx", None, portable=True)
    (tmp_path / "onnx" / "portable").rename(tmp_path / "portable" / "portable")
    triton.emit(program, tmp_path / "triton", None, (), torch.float16)
    for name in ("vllm", "onnx", "portable", "triton"):
        refused([made["transformers"], tmp_path / name], "_proj|attention.qkv", logits=False)


def test_a_float_model(tiny_llama, made):
    """It has no hashes, and transformers reads it; its rounded self is something else."""
    files, numbers, logits = verify([tiny_llama])
    assert not files.proven and numbers.proven and logits.proven
    for name in ("gptq", "onnx", "triton"):
        refused([tiny_llama, made[name]], "holds integers for '.*', which is in float in", logits=False)


def test_without_a_model_nothing_is_compared(made):
    found = verify([made["onnx"]])
    assert [f.proven for f in found] == [True, False]
    assert "no model is among the targets" in found[1].said


def test_what_was_just_written_is_read_again(made, copy):
    folder = copy("onnx")
    check_written(folder, made["program"])
    change_data(folder, f"{UP}.weight.codes")
    with pytest.raises(TpvcError, match="at row 0, column 0; 'the model' holds"):
        check_written(folder, made["program"])


def test_a_tolerance_is_no_blank_cheque(made):
    """Float32 sums may differ by less than a thousandth of the largest logit, float16 by less than a tenth."""
    expected = Expected.of(made["program"])
    largest = expected.logits.abs().max().item()
    assert expected.tolerance()[0] < 1e-3 * largest and expected.tolerance(torch.float16)[0] < 0.1 * largest
    wrong = expected.logits.clone()
    wrong[5, 7] += 1e-3 * largest
    with pytest.raises(TpvcError, match="of token id 7 after 6 tokens"):
        expected.check(wrong, "x", "torch")
    wrong[5, 7] = float("nan")
    with pytest.raises(TpvcError, match="the logit nan of token id 7 after 6 tokens"):
        expected.check(wrong, "x", "torch")


def test_a_block_that_is_missing_is_no_rounding(made):
    """Not even in bfloat16, of which every value of the graph is one; one token is enough to tell."""
    program = made["program"]
    expected = Expected.of(program)
    last = [n for n in program.block(program.blocks - 1) if n.op == "add"][-1].name
    before = [n for n in program.block(program.blocks - 2) if n.op == "add"][-1].name

    def skipping(node):
        return replace(node, inputs=tuple(before if v == last else v for v in node.inputs))

    short = replace(program, nodes=tuple(skipping(n) for n in program.nodes))
    found = interpret.logits(short, expected.ids[None])[0]
    for logits in (found, found[-1:]):
        with pytest.raises(TpvcError, match=r"off by .* on average|the logit"):
            expected.check(logits, "x", "torch", torch.bfloat16)


def test_groups_of_other_sizes_are_the_same_numbers(made):
    q = made["program"].params[f"{UP}.weight"]
    halves = replace(q, scale=q.scale.repeat_interleave(2, 1), zero=q.zero.repeat_interleave(2, 1))
    check_same("w", q, halves, "b", "a")
    halves.zero[3, 1] += 1
    with pytest.raises(TpvcError, match="zero point of 'w' at row 3, group of 16 columns 1"):
        check_same("w", q, halves, "b", "a")


def test_a_damaged_manifest(made, copy):
    folder = copy("gptq")
    (folder / "tpvc.json").write_text(json.dumps({"tpvc": "0"}))
    assert not verify([folder], logits=False)[0].proven
    (folder / "tpvc.json").write_text("{")
    refused([folder], "cannot be read as JSON")


def test_a_tied_head_that_a_format_holds_twice(tmp_path, flip, tiny_tokenizer):
    """vLLM's checkpoint has a matrix for the head and one for the embedding: both are those of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=384, max_position_embeddings=64, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    tiny_tokenizer.save_pretrained(tmp_path / "float")
    tpvc.quantize(tmp_path / "float", tmp_path / "w4", method="rtn", group=32, head_bits=8)
    tpvc.export(tmp_path / "w4", tmp_path / "vllm", to="vllm")
    assert "lm_head.weight" in frontends.load(tmp_path / "vllm").params
    said = [f.said for f in verify([tmp_path / "w4", tmp_path / "vllm"], logits=False) if f.subject == "numbers"]
    assert len(said) == 2 and said[1].startswith("as in")
    flip(tmp_path / "vllm", "lm_head.weight_packed")
    (tmp_path / "vllm" / "tpvc.json").unlink()
    with pytest.raises(TpvcError, match=r"as the code of 'model\.embed_tokens\.weight' at row 0, column 0"):
        verify([tmp_path / "w4", tmp_path / "vllm"], logits=False)
