"""From `tpvc quantize --scheme W8A8` to what inspects, measures, exports and runs it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpvc.compiler import frontends
from tpvc.compiler.backends import triton
from tpvc.compiler.program import read, rounded_inputs
from tpvc.compiler.sha256 import sha256
from tpvc.kernels import package

TEXT = "The quick brown"


@pytest.fixture(scope="module")
def w8a8(ok, tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("artefacts") / "w8a8"
    ok("quantize", tiny_llama, "-o", out, "--scheme", "W8A8", "--method", "rtn")
    return out


def test_the_manifest_and_inspect_say_it(ok, w8a8):
    manifest = json.loads((w8a8 / "tpvc.json").read_text())
    assert manifest["options"]["activations"] == "int8"
    assert manifest["passes"][0] == {"name": "RoundActivations", "kind": "int8"}
    found = ok("inspect", w8a8)
    said = "W8 per channel symmetric, activations int8 per token"
    assert found["grids"] == {said: 14, "W8 per channel symmetric": 1}
    assert found["operators"]["round_rows"] == 8
    assert set(rounded_inputs(frontends.load(w8a8)).values()) == {"int8"}


def test_an_adapter_of_the_float_model_is_refused_where_its_outputs_were_divided(
    ok, refused, w8a8, tiny_llama, write_adapter, tmp_path
):
    """Rotations do not commute with factors that differ; an adapter that was tuned on the artefact knows them."""
    divided = json.loads((w8a8 / "tpvc.json").read_text())["divided"]
    assert divided and all(name.endswith(("up_proj", "v_proj")) for name in divided)
    road = write_adapter(tiny_llama, tmp_path / "own")
    said = refused("export", w8a8, "-o", tmp_path / "onnx", "--road", f"own={road}")
    assert "whose outputs were divided" in said and "--road when quantising" in said
    ok("export", w8a8, "-o", tmp_path / "vllm", "--to", "vllm")
    assert json.loads((tmp_path / "vllm/tpvc.json").read_text())["divided"] == divided
    assert "whose outputs were divided" in refused("run", tmp_path / "vllm", TEXT, "--adapter", road)
    tuned = {"artefact": "road", "base": {"files": frontends.load(w8a8).source.files}}
    (tmp_path / "own/tpvc.json").write_text(json.dumps(tuned))
    ok("export", w8a8, "-o", tmp_path / "onnx", "--road", f"own={road}")


def test_float_activations_leave_no_trace(ok, tiny_llama, tmp_path):
    ok("quantize", tiny_llama, "-o", tmp_path / "w8", "--bits", 8, "--method", "rtn")
    assert "activations" not in json.loads((tmp_path / "w8/tpvc.json").read_text())["options"]
    assert not rounded_inputs(frontends.load(tmp_path / "w8"))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_learned_under_rounded_activations_and_an_adapter(ok, tiny_llama, write_adapter, tmp_path, kind):
    """The reported errors are those of blocks that round both; the same command gives the same bytes."""
    write_adapter(tiny_llama, tmp_path / "own")
    given = (
        "--bits",
        4,
        "--group-size",
        32,
        "--activations",
        kind,
        "--recipe",
        "fast",
        "--nsamples",
        16,
        "--seqlen",
        16,
    )
    given += ("--road", f"own={tmp_path / 'own'}")
    for name in ("a", "b"):
        ok("quantize", tiny_llama, "-o", tmp_path / name, *given)
    a, b = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()
    manifest = json.loads((tmp_path / "a/tpvc.json").read_text())
    eased = ["EaseInputs"] if kind == "int8" else []
    passes = ["RoundActivations", "BankRoad", *eased, "FlexRound", "RoundToNearest"]
    assert [p["name"] for p in manifest["passes"]] == passes
    assert all(r["error"] <= r["error_rtn"] for r in manifest["blocks"])
    program = frontends.load(tmp_path / "a")
    assert len(rounded_inputs(program)) == 14 and [x.name for x in program.adapters] == ["own"]


@pytest.fixture(scope="module")
def static(ok, tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("artefacts") / "static"
    given = ("--scheme", "W8A8", "--activations", "int8-static", "--method", "rtn", "--nsamples", 16, "--seqlen", 16)
    ok("quantize", tiny_llama, "-o", out, *given)
    return out


def test_on_static_grids_it_is_inspected_exported_verified_and_run(ok, refused, static, tmp_path):
    manifest = json.loads((static / "tpvc.json").read_text())
    assert manifest["options"]["activations"] == "int8-static" and manifest["calibration"]["nsamples"] == 16
    names = ["RoundActivations", "EaseInputs", "RoundToNearest", "RoundToNearest"]
    assert [p["name"] for p in manifest["passes"]] == names
    assert ok("inspect", static)["grids"]["W8 per channel symmetric, activations int8 per tensor"] > 0
    ok("export", static, "-o", tmp_path / "onnx", "--accuracy-level", 0, "--portable")
    ok("export", static, "-o", tmp_path / "vllm", "--to", "vllm")
    ok("verify", static, tmp_path / "onnx", tmp_path / "vllm")
    ours, theirs = (ok("run", x, TEXT, "--raw", "--max-new-tokens", 4)["tokens"] for x in (static, tmp_path / "onnx"))
    assert ours == theirs
    said = refused("export", static, "-o", tmp_path / "gpu", "--to", "triton", "--target", "cuda:80")
    assert "on one grid for all tokens" in said and "--activations int8" in said
    assert "int8-static" in refused("export", static, "-o", tmp_path / "awq", "--to", "awq")


def test_another_static_grid_is_another_model(ok, refused, static, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(static, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.input_zero_point"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((other / "tpvc.json").read_text())
    manifest["files"]["model.safetensors"] = sha256(other / "model.safetensors")
    (other / "tpvc.json").write_text(json.dumps(manifest))
    said = refused("verify", static, other)
    assert "'model.layers.1.mlp.down_proj.weight' reads is rounded on (scale, zero point)" in said


def test_it_is_measured_and_run(ok, w8a8, tiny_llama):
    found = ok("eval", w8a8, "--against", tiny_llama)
    assert 0 < found["against"]["kl"] < 0.01
    assert len(ok("run", w8a8, TEXT, "--raw", "--max-new-tokens", 3)["tokens"]) <= 3


def test_a_package_holds_its_kernels_and_runs(ok, w8a8, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "ROWS", (1, 2))
        ok("export", w8a8, "-o", tmp_path / "gpu", "--to", "triton", "--target", "cuda:80")
    kernels = package.read(tmp_path / "gpu/kernels")
    bodies = {(e.kernel, e.target) for e in kernels.entries}
    for kernel in ("round_rows:round_row", "linear_a8:slab_product_a8", "linear:slab_product"):
        assert {(kernel, "cuda:80"), (kernel, "ptx:80")} <= bodies
    ours, theirs = (ok("run", x, TEXT, "--raw", "--max-new-tokens", 4)["tokens"] for x in (w8a8, tmp_path / "gpu"))
    assert ours == theirs


def test_an_onnx_folder_and_vllms_layout(ok, w8a8, tmp_path):
    ok("export", w8a8, "-o", tmp_path / "onnx", "--accuracy-level", 0)
    ours, theirs = (ok("run", x, TEXT, "--raw", "--max-new-tokens", 4)["tokens"] for x in (w8a8, tmp_path / "onnx"))
    assert ours == theirs
    ok("export", w8a8, "-o", tmp_path / "vllm", "--to", "vllm")
    a, b = (frontends.load(x).params["model.layers.0.mlp.up_proj.weight"] for x in (w8a8, tmp_path / "vllm"))
    assert torch.equal(read(a).codes, read(b).codes)


def test_bad_input(refused, tiny_llama, tmp_path):
    said = refused("quantize", tiny_llama, "-o", tmp_path / "a", "--bits", 8, "--activations", "fp8")
    assert "at most 4 bits" in said and "found 8" in said
    assert "contradict" in refused(
        "quantize", tiny_llama, "-o", tmp_path / "a", "--scheme", "W8A8", "--activations", "fp8"
    )
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()


@pytest.mark.parametrize("options", [("--dataset", "self"), ("--avg-bits", 4.5)], ids=["self", "avg-bits"])
@pytest.mark.parametrize("kind", ["int8", "int8-static"])
def test_what_looks_before_there_are_grids_looks_at_the_float_model(ok, tiny_llama, tmp_path, kind, options):
    learned = ("--iters", 2, "--nsamples", 12, "--seqlen", 24)
    ok("quantize", tiny_llama, "-o", tmp_path / "out", "--activations", kind, *learned, *options)
    found = set(rounded_inputs(frontends.load(tmp_path / "out")).values())
    assert found and found <= {"int8", "int8-static"} and (kind == "int8-static" or found == {"int8"})
