"""`avg_bits` from a checkpoint to every format: the same integers at several widths, or one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpvc.compiler import frontends
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.export_pipeline import export
from tpvc.compiler.pipeline import quantize
from tpvc.compiler.program import grid_of, linears, read, rounded_inputs
from tpvc.compiler.verification import verify

OPTIONS = {"avg_bits": 4.2, "group": 32, "nsamples": 16, "seqlen": 32, "dataset": "self"}


@pytest.fixture(scope="module")
def uneven(tiny_llama, tmp_path_factory):
    """The tiny Llama where some matrices count for more and some for nothing, so that every width has its use."""
    model = tmp_path_factory.mktemp("uneven") / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    for part, factor in (("0.self_attn.o", 16.0), ("0.mlp.down", 0.01), ("1.self_attn.o", 0.1), ("1.mlp.down", 4.0)):
        tensors[f"model.layers.{part}_proj.weight"] *= factor
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.fixture(scope="module", params=["rtn", "flexround"])
def mixed(uneven, tmp_path_factory, request):
    steps = {"steps": 4} if request.param == "flexround" else {}
    return quantize(uneven, tmp_path_factory.mktemp("mixed") / "out", method=request.param, **steps, **OPTIONS)


def widths(program) -> dict[str, int]:
    nodes = linears(n for n in program.nodes if n.block is not None)
    return {n.name: grid_of(program.params[n.params["weight"]]).bits for n in nodes}


def test_what_was_chosen_is_what_was_written(mixed, uneven):
    manifest, program = json.loads((mixed / "tpvc.json").read_text()), frontends.load(mixed)
    chosen = manifest["chosen_bits"]
    assert manifest["options"]["avg_bits"] == chosen["asked"] == 4.2 and "bits" not in manifest["options"]
    assert {n: g["bits"] for g in chosen["groups"] for n in g["names"]} == widths(program)
    assert len({g["bits"] for g in chosen["groups"]}) >= 3
    numbers = bits = codes = 0
    for node in linears(n for n in program.nodes if n.block is not None):
        q = read(program.params[node.params["weight"]])
        numbers += q.codes.numel()
        codes += q.codes.numel() * q.grid.bits
        bits += q.codes.numel() * q.grid.bits + q.scale.numel() * (8 * q.scale_dtype.itemsize + q.grid.bits)
    assert chosen["codes"] == codes / numbers
    assert chosen["taken"] == bits / numbers <= 4.2
    assert [b["block"] for b in manifest["blocks"]] == [0, 1]
    assert "Bits of each group of linears" in (mixed / "report.html").read_text()


@pytest.mark.parametrize("to", ["onnx", "triton", "vllm", "gptq_v2", "awq"])
def test_the_same_integers_in_every_format(mixed, tmp_path, to):
    """Packages are made for no GPU, so that nothing has to be compiled."""
    out = tmp_path / to
    if to == "awq":
        with pytest.raises(TpvcError, match="cannot be written as AWQ: it packs 4 bits"):
            export(mixed, out, to=to)
        return
    if to == "triton":
        from tpvc.compiler.backends import triton

        out.mkdir()
        program = frontends.load(mixed)
        triton.emit(program, out, frontends.tokenizer(program), (), torch.float16)
    else:
        export(mixed, out, to=to)
    computed = to in ("onnx", "triton")  # the others have no runtime here
    found = verify([mixed, out], logits=computed)
    shown = {(f.target, f.subject) for f in found if f.proven}
    wanted = {(str(out), "numbers")} | {(str(t), "logits") for t in (mixed, out) if computed}
    assert wanted <= shown, found
    if to in ("vllm", "gptq_v2"):
        assert widths(frontends.load(out)) == widths(frontends.load(mixed))


def test_the_same_command_gives_the_same_bytes_after_a_stop(uneven, mixed, tmp_path):
    if json.loads((mixed / "tpvc.json").read_text())["options"]["method"] == "flexround":
        pytest.skip("once is enough")

    def stop(stage, done, total, note):
        if stage == "measure bits" and note == "block 0":
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(uneven, out, method="rtn", progress=stop, **OPTIONS)
    assert not out.exists()
    with pytest.raises(TpvcError, match=r"avg_bits is 4\.2, not 5"):
        quantize(uneven, out, method="rtn", **{**OPTIONS, "avg_bits": 5})
    seen = []
    quantize(uneven, out, method="rtn", progress=lambda *told: seen.append(told), **OPTIONS)
    assert not any(stage == "measure bits" and note == "block 1" for stage, _, _, note in seen)
    for file in ("model.safetensors", "tpvc.json", "config.json"):
        assert (out / file).read_bytes() == (mixed / file).read_bytes()


def test_contradictions_and_averages_that_no_width_has(tiny_llama, tmp_path):
    with pytest.raises(TpvcError, match=r"found 3 bits for every weight and 3\.5 on average"):
        quantize(tiny_llama, tmp_path / "out", bits=3, avg_bits=3.5)
    with pytest.raises(TpvcError, match=r"found an average of 1\.9 bits, expected .* choose with --avg-bits"):
        quantize(tiny_llama, tmp_path / "out", avg_bits=1.9)
    with pytest.raises(TpvcError, match=r"average of 8 bits, expected .*: codes of 2 to 4 bits"):
        quantize(tiny_llama, tmp_path / "out", avg_bits=8, activations="fp8")


def test_activations_are_rounded_beside_mixed_widths(uneven, tmp_path):
    out = quantize(uneven, tmp_path / "out", method="rtn", activations="int8", **OPTIONS)
    program = frontends.load(out)
    assert len(set(widths(program).values())) >= 3
    assert set(rounded_inputs(program).values()) == {"int8"}
    found = [f for f in verify([out]) if f.subject == "logits"]
    assert found and all(f.proven for f in found), found
