"""From `tpvc quantize --cache int8` to what inspects, exports, verifies and refuses it."""

import json
import shutil

import pytest

from tpvc.compiler import frontends
from tpvc.compiler.backends import triton
from tpvc.compiler.program import rounded_cache, rounded_inputs


@pytest.fixture(scope="module")
def kv8(ok, tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("artefacts") / "kv8"
    given = ("--bits", 4, "--group-size", 32, "--sym", "--cache", "int8", "--method", "rtn")
    ok("quantize", tiny_llama, "-o", out, *given)
    return out


def test_the_checkpoint_manifest_and_inspect_say_it(ok, kv8):
    manifest = json.loads((kv8 / "tpvc.json").read_text())
    assert manifest["options"]["cache"] == "int8"
    assert manifest["passes"][0] == {"name": "RoundCache", "kind": "int8"}
    scheme = json.loads((kv8 / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    own = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "group", "group_size": 16}
    assert scheme == own
    found = ok("inspect", kv8)
    assert found["facts"]["keys and values"] == "int8, a scale for every head of a token"
    assert found["operators"]["round_heads"] == 4 and rounded_cache(frontends.load(kv8)) == "int8"


def test_a_float_cache_leaves_no_trace(ok, artefact):
    assert "cache" not in json.loads((artefact / "tpvc.json").read_text())["options"]
    assert rounded_cache(frontends.load(artefact)) is None
    assert "keys and values" not in ok("inspect", artefact)["facts"]


def test_learned_under_it_and_under_rounded_activations(ok, tiny_llama, tmp_path):
    given = ("--bits", 4, "--group-size", 32, "--recipe", "fast", "--iters", 4, "--nsamples", 8, "--seqlen", 16)
    told = ok("quantize", tiny_llama, "-o", tmp_path / "a", *given, "--activations", "int8", "--cache", "int8")
    names = [p["name"] for p in told["manifest"]["passes"]]
    assert names[:4] == ["RoundActivations", "RoundCache", "EaseInputs", "FlexRound"]
    plain = ok("quantize", tiny_llama, "-o", tmp_path / "b", *given, "--activations", "int8")
    errors = [[b["error_rtn"] for b in m["manifest"]["blocks"]] for m in (told, plain)]
    assert errors[0] != errors[1]
    program = frontends.load(tmp_path / "a")
    assert rounded_cache(program) == "int8" and len(rounded_inputs(program)) == 14


def test_formats_without_such_a_cache_say_so_and_are_verified(ok, kv8, tmp_path):
    for to in ("onnx", "gptq", "awq", "vllm"):
        portable = ("--portable", "--accuracy-level", 0) if to == "onnx" else ()
        (note,) = (n for n in ok("export", kv8, "-o", tmp_path / to, "--to", to, *portable)["notes"] if "keys" in n)
        assert note.endswith("keeps keys and values in float, not in int8 as the model was quantised for")
        assert json.loads((tmp_path / to / "tpvc.json").read_text())["notes"].count(note) == 1
    assert rounded_cache(frontends.load(tmp_path / "gptq")) is rounded_cache(frontends.load(tmp_path / "vllm")) is None
    found = ok("verify", kv8, *(tmp_path / to for to in ("onnx", "gptq", "awq", "vllm")))["findings"]
    proven = {(f["kind"], f["subject"]) for f in found if f["proven"]}
    asides = {f["kind"]: ", keys and values in float: off by" in f["said"] for f in found if f["subject"] == "logits"}
    assert asides["ONNX folder"] and not asides["compressed-tensors checkpoint"]
    assert {
        ("compressed-tensors checkpoint", "logits"),
        ("ONNX folder", "logits"),
        ("AWQ checkpoint", "numbers"),
    } <= proven


def test_a_package_has_it_without_being_asked_and_is_verified(ok, kv8, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "ROWS", (1, 2))
        ok("export", kv8, "-o", tmp_path / "gpu", "--to", "triton", "--target", "cuda:80")
    assert json.loads((tmp_path / "gpu/triton.json").read_text())["cache"] == "int8"
    assert json.loads((tmp_path / "gpu/tpvc.json").read_text())["options"]["cache"] == "int8"
    found = ok("verify", kv8, tmp_path / "gpu")["findings"]
    assert all(f["proven"] for f in found if f["kind"] == "Triton package")


def test_a_plan(ok, tiny_llama):
    given = ("--method", "rtn", "--bits", 4, "--group-size", 32)
    plain, found = (ok("plan", tiny_llama, *given, *more) for more in ((), ("--cache", "int8")))
    assert (plain["size"]["cache"], found["size"]["cache"]) == (2 * 2 * 2 * 16 * 2, 2 * 2 * 2 * (16 + 4))
    said = {v["to"]: v["path"] for v in found["runtimes"]}
    assert said["onnx"].endswith("keys and values in float") and "int8 cache" in said["triton"]
    assert not any("keys and values" in v["path"] for v in plain["runtimes"])


def test_caches_of_others_are_refused(refused, kv8, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(kv8, folder)
    config = json.loads((folder / "config.json").read_text())
    scheme = config["quantization_config"]["kv_cache_scheme"]
    for changed, said in (
        ({"type": "float", "strategy": "tensor", "dynamic": False}, "keeps the key/value cache with num_bits 8"),
        ({"strategy": "token", "group_size": None}, "strategy token"),
        ({"group_size": 8}, "in groups of 8 features; expected whole heads of 16"),
    ):
        config["quantization_config"]["kv_cache_scheme"] = scheme | changed
        (folder / "config.json").write_text(json.dumps(config))
        assert said in refused("inspect", folder)
