"""GPTQ and AWQ checkpoints: what is written is read again bit for bit, and what they cannot hold is refused first."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tpvc.compiler.backends.huggingface import emit
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import logits
from tpvc.compiler.program import Grid, dense, grid_of, linears, read
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.round_to_nearest import quantize

GRIDS = [Grid(b, g, s) for b in (2, 3, 4, 8) for g in (32, 16, -1, 0) for s in (True, False)]
HEAD = Grid(8, -1, True)


def rounded(directory, grid, head=None, scale_dtype=torch.float16, keep=()):
    """The model in `directory`, rounded to nearest; zero points are at least 1."""
    program, changed = load(directory), {}
    for node in linears(program.nodes):
        name, on = node.params["weight"], head if node.block is None else grid
        if on is None or name in keep:
            continue
        q = quantize(dense(program.params[name]), on, scale_dtype)
        changed[name] = replace(q, zero=None if q.zero is None else q.zero.clamp(min=1))
    return program.with_params(changed)


def written(program, out, runtime):
    out.mkdir()
    notes = emit(program, out, None, {"options": {"to": runtime}}, runtime=runtime)
    return notes, load(out)


def same(program, again, grid):
    """The linears of the blocks bit for bit, everything else as it was."""
    for name, parameter in program.params.items():
        was, now = read(parameter), read(again.params[name])
        if name in {n.params["weight"] for n in linears(program.nodes) if n.block is not None}:
            assert torch.equal(was.codes, now.codes) and torch.equal(was.scale.expand_as(now.scale), now.scale)
            assert now.grid == replace(grid, group=grid.group or -1)
            assert now.zero is None if was.zero is None else torch.equal(was.zero.expand_as(now.zero), now.zero)
        else:
            assert torch.equal(dense(was).to(now.dtype), now)


@pytest.mark.parametrize("runtime", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_comes_back(tiny_llama, tmp_path, grid, runtime):
    program = rounded(tiny_llama, grid)
    notes, again = written(program, tmp_path / "out", runtime)
    same(program, again, grid)
    assert notes == []
    said = again.source.config["quantization_config"]
    assert said["checkpoint_format"] == runtime and said["sym"] == grid.symmetric and "dynamic" not in said
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    own = {n.removeprefix("model.layers.0.mlp.up_proj.") for n in tensors if "0.mlp.up_proj" in n}
    assert own == {"qweight", "qzeros", "scales", "g_idx"}
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16


@pytest.mark.parametrize("group", [32, 16, -1, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_comes_back(tiny_llama, tmp_path, group, symmetric):
    """Symmetric weights come back with zero points of 8, which every reader knows."""
    program = rounded(tiny_llama, Grid(4, group, symmetric))
    _, again = written(program, tmp_path / "out", "awq")
    if symmetric:
        eights = {
            n: replace(q, zero=torch.full_like(q.scale, 8).byte()) for n, q in program.params.items() if grid_of(q)
        }
        program = program.with_params(eights)
    same(program, again, Grid(4, group, False))
    said = again.source.config["quantization_config"]
    assert said["modules_to_not_convert"] == ["lm_head"] and said["group_size"] == (group or -1)


@pytest.mark.parametrize("runtime", ["gptq", "gptq_v2", "awq"])
def test_transformers_understands_the_config(tiny_llama, tmp_path, runtime):
    """The weights would be read by gptqmodel."""
    from transformers import AutoConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    written(rounded(tiny_llama, Grid(4, 32, False)), tmp_path / "out", runtime)
    given = AutoConfig.from_pretrained(tmp_path / "out").quantization_config
    config = AutoQuantizationConfig.from_dict(given)
    assert config.bits == 4 and config.group_size == 32
    assert config.format == {"awq": "gemm"}.get(runtime, runtime)
    if runtime == "awq":
        assert config.zero_point and config.modules_to_not_convert == ["lm_head"]
    else:
        assert not config.sym and not config.desc_act


@pytest.mark.parametrize("runtime", ["gptq", "awq"])
def test_logits_and_a_head_in_float(tiny_llama, tmp_path, runtime):
    """An 8-bit head is written as the float32 numbers that it means, so that nothing changes."""
    program = rounded(tiny_llama, Grid(4, 32, False), HEAD)
    notes, again = written(program, tmp_path / "out", runtime)
    assert len(notes) == 1 and "'lm_head.weight' is written in float32" in notes[0]
    ids = torch.arange(20)[None]
    assert torch.equal(logits(program, ids), logits(again, ids))


def test_a_tied_head_stays_tied(tmp_path, tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    program = rounded(tmp_path / "tied", Grid(4, 32, False), HEAD)
    _, again = written(program, tmp_path / "out", "gptq")
    assert "lm_head.weight" not in again.params and grid_of(again.params["model.embed_tokens.weight"]) is None
    same(program, again, Grid(4, 32, False))


def test_gptq_names_what_differs(tiny_llama, tmp_path):
    """Another grid for the MLPs, and a linear in float."""
    kept = "model.layers.1.self_attn.o_proj.weight"
    program = rounded(tiny_llama, Grid(4, 32, False), keep=(kept,))
    other, grid = rounded(tiny_llama, Grid(8, -1, True)), Grid(8, -1, True)
    program = program.with_params({n: q for n, q in other.params.items() if ".mlp.down" in n})
    _, again = written(program, tmp_path / "out", "gptq")
    rules = again.source.config["quantization_config"]["dynamic"]
    assert len(rules) == 3 and rules["-:^model\\.layers\\.1\\.self_attn\\.o_proj$"] == {}
    for name, parameter in program.params.items():
        assert grid_of(again.params[name]) == grid_of(parameter)
        assert grid_of(parameter) is None or torch.equal(read(again.params[name]).codes, parameter.codes)
    assert grid_of(again.params["model.layers.0.mlp.down_proj.weight"]) == grid
    with pytest.raises(TpvcError, match=r"down_proj.weight' \(W8 per channel symmetric\) cannot .* AWQ: it packs 4"):
        written(program, tmp_path / "awq", "awq")


def test_vllm_finds_what_it_joins(tiny_llama, tmp_path):
    """By the one name under which it asks for linears that are alike; unlike ones have none."""
    program, other = rounded(tiny_llama, Grid(4, 32, True)), rounded(tiny_llama, Grid(8, 32, True))
    first, second = (f"model.layers.{i}." for i in range(2))
    wide = [first + f"mlp.{n}_proj.weight" for n in ("gate", "up")] + [second + "mlp.up_proj.weight"]
    kept = {second + f"self_attn.{n}_proj.weight" for n in "qkv"}
    floats = {n: dense(program.params[n]) for n in kept}
    program = program.with_params({n: other.params[n] for n in wide} | floats)
    _, again = written(program, tmp_path / "out", "gptq")
    rules = again.source.config["quantization_config"]["dynamic"]

    def told(module):  # vLLM and GPTQModel: the first rule whose pattern matches
        return next((rule[0], fields) for rule, fields in rules.items() if re.match(rule[2:], module))

    assert (
        told(first + "mlp.gate_up_proj")
        == told(first + "mlp.up_proj")
        == ("+", {"bits": 8, "group_size": 32, "sym": True})
    )
    assert told(second + "self_attn.qkv_proj") == told(second + "self_attn.k_proj") == ("-", {})
    assert not [rule for rule in rules if re.match(rule[2:], second + "mlp.gate_up_proj")]
    assert all(grid_of(again.params[n]) == grid_of(p) for n, p in program.params.items())


def test_scales_beyond_float16_keep_their_dtype(tiny_llama, tmp_path):
    program = rounded(tiny_llama, Grid(4, 32, True), scale_dtype=torch.float32)
    notes, again = written(program, tmp_path / "out", "gptq")
    assert notes == ["scales that float16 does not hold exactly are written in float32"]
    same(program, again, Grid(4, 32, True))


def test_what_is_refused_before_anything_is_written(tiny_llama, tmp_path):
    def refused(program, runtime, said):
        with pytest.raises(TpvcError, match=said):
            written(program, tmp_path / "out", runtime)
        assert list((tmp_path / "out").iterdir()) == []
        (tmp_path / "out").rmdir()

    first = "'model.layers.0.self_attn.q_proj.weight'"
    refused(load(tiny_llama), "gptq", "no linear of a block is an integer matrix")
    refused(rounded(tiny_llama, Grid(5, 32, True)), "gptq", rf"{first} \(W5 g32 symmetric\) .* packs 2, 3, 4, 8 bits")
    refused(rounded(tiny_llama, Grid(3, 32, True)), "awq", f"{first} .* packs 4 bits")
    program = rounded(tiny_llama, Grid(4, 32, False))
    q = program.params["model.layers.1.mlp.up_proj.weight"]
    zero = q.zero.clone()
    zero[7, 1] = 0
    changed = program.with_params({"model.layers.1.mlp.up_proj.weight": replace(q, zero=zero)})
    refused(changed, "gptq", r"'model.layers.1.mlp.up_proj.weight' .* row 7, group 1 is 0.*gptq_v2")
    _, again = written(changed, tmp_path / "v2", "gptq_v2")
    assert torch.equal(read(again.params["model.layers.1.mlp.up_proj.weight"]).zero, zero)
    other = rounded(tiny_llama, Grid(4, 16, False)).params["model.layers.1.mlp.up_proj.weight"]
    changed = program.with_params({"model.layers.1.mlp.up_proj.weight": other})
    refused(changed, "awq", r"up_proj' \(W4 g16 asymmetric\) .* most linears are W4 g32 asymmetric")
    refused(RoundActivations("int8")(rounded(tiny_llama, Grid(8, -1, True))), "gptq", "rounded to int8, which GPTQ")


def test_sizes_that_readers_do_not_take(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 1, "vocab_size": 50}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "odd")
    with pytest.raises(TpvcError, match="multiples of 32, found 48x48; take --to vllm"):
        written(rounded(tmp_path / "odd", Grid(4, -1, True)), tmp_path / "gptq", "gptq")
    with pytest.raises(TpvcError, match=r"gate_proj.* by eight, found 100"):
        written(rounded(tmp_path / "odd", Grid(4, -1, True)), tmp_path / "awq", "awq")


def test_the_same_bytes_twice(tiny_llama, tmp_path):
    program = rounded(tiny_llama, Grid(4, 32, False), HEAD)
    for name in ("a", "b"):
        written(program, tmp_path / name, "gptq")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    hashes = json.loads((tmp_path / "a" / "tpvc.json").read_text())["files"]
    assert {"config.json", "model.safetensors"} <= hashes.keys()


@pytest.mark.parametrize(
    ("runtime", "grid"),
    [
        ("gptq", Grid(4, 32, True)),
        ("gptq", Grid(4, 32, False)),
        ("gptq", Grid(8, 32, True)),
        ("gptq", Grid(2, 16, False)),
        ("awq", Grid(4, 32, False)),
        ("awq", Grid(4, 32, True)),
    ],
    ids=str,
)
def test_another_reader_finds_the_same_integers(tiny_llama, tmp_path, runtime, grid):
    """The loaders of ONNX Runtime GenAI's model builder, which repack both formats for MatMulNBits."""
    from onnxruntime_genai.models.loaders.quant_model import QuantModel

    program = rounded(tiny_llama, grid)
    _, again = written(program, tmp_path / "out", runtime)
    attributes = {"config": again.source.config["quantization_config"], "use_g_idx": False}
    sizes = {"q_size": 64, "kv_size": 32, "intermediate_size": 128, "num_layers": 2}
    model = QuantModel.from_pretrained(runtime, input_path=str(tmp_path / "out"), quant_attrs=attributes, **sizes)
    for index, layer in enumerate(model.layers):
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            home, _, own = module.partition(".")
            theirs = getattr(getattr(layer, home), own)
            ours = program.params[f"model.layers.{index}.{module}.weight"]
            count, shifts = 8 // grid.bits, torch.arange(0, 8, grid.bits)
            codes, zeros = ((t[..., None] >> shifts) & (2**grid.bits - 1) for t in (theirs.qweight, theirs.qzeros))
            assert torch.equal(codes.reshape(ours.shape).to(torch.uint8), ours.codes) and count * grid.bits == 8
            zeros = zeros.reshape(len(ours.codes), -1)[:, : ours.scale.shape[1]]
            middle = torch.full_like(zeros, 2 ** (grid.bits - 1)) if ours.zero is None else ours.zero
            assert torch.equal(zeros.to(torch.uint8), middle.to(torch.uint8))
            assert torch.equal(theirs.scales.reshape(ours.scale.shape).float(), ours.scale)
