"""`tpvc plan`: headers in, memory, time, bytes and runtimes out."""

import json
import os
import struct

import pytest

from tpvc.compiler.frontends.weights import Stored


def test_a_model(ok, tiny_llama, tmp_path):
    options = ("--bits", 4, "--group-size", 32, "--recipe", "fast", "--iters", 2, "--nsamples", 8, "--seqlen", 32)
    found = ok("plan", tiny_llama, *options)
    made = ok("quantize", tiny_llama, "-o", tmp_path / "out", *options)
    assert found["grid"] == "W4 g32 asymmetric"
    assert found["size"]["artefact"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found["size"]["tokenizer"] == sum(
        (tmp_path / "out" / f).stat().st_size for f in tokenizer_files(tmp_path / "out")
    )
    assert found["quantize"]["seconds"] > 0 and found["quantize"]["sampled"] == 0
    assert found["quantize"]["device_bytes"] == 0
    assert {v["to"] for v in found["runtimes"]} == {"", "vllm", "gptq", "gptq_v2", "awq", "onnx", "triton"}
    assert made["peak_bytes"] > 0  # of this process, which has run other tests: benchmarks/plan_memory.py compares


@pytest.mark.parametrize("method", ["rtn", "flexround"])
def test_an_average(ok, tiny_llama, method):
    options = ("--group-size", 32, "--recipe", "fast", "--iters", 2, "--nsamples", 8, "--seqlen", 32)
    found = ok("plan", tiny_llama, "--avg-bits", 4.5, "--method", method, *options)
    uniform = [ok("plan", tiny_llama, "--bits", b, "--method", method, *options) for b in (3, 4)]
    assert found["grid"] is None
    assert uniform[0]["size"]["artefact"] < found["size"]["artefact"] < uniform[1]["size"]["artefact"]
    assert found["quantize"]["seconds"] > 0 and found["quantize"]["host_bytes"] > 0
    loads = {v["to"]: v["loads"] for v in found["runtimes"]}
    assert loads[""] == loads["onnx"] == loads["gptq_v2"] == "yes" and loads["awq"] == "no"


def tokenizer_files(folder):
    return [f for f in os.listdir(folder) if f.startswith(("tokenizer", "special", "chat_template"))]


def test_no_weight_is_read(ok, tiny_llama, tmp_path, monkeypatch):
    """Neither in this process nor in that of the probe: a copy with numbers that no reader lets pass."""
    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    for file in os.listdir(tiny_llama):
        (poisoned / file).write_bytes((tiny_llama / file).read_bytes())
    path = poisoned / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start:] = b"\xff" * (len(data) - start)  # NaN
    path.write_bytes(data)
    monkeypatch.setattr(Stored, "read", lambda self: 1 / 0)
    (tmp_path / "json.py").write_text("raise SystemExit('run from the working directory')")
    monkeypatch.chdir(tmp_path)
    found = ok("plan", poisoned, "--recipe", "fast", "--iters", 1, "--nsamples", 8, "--seqlen", 16)
    assert found["quantize"]["seconds"] > 0


def test_a_poisoned_model_is_what_quantize_refuses(refused, tiny_llama, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    for file in os.listdir(tiny_llama):
        (path / file).write_bytes((tiny_llama / file).read_bytes())
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-4096:] = b"\xff" * 4096
    (path / "model.safetensors").write_bytes(data)
    assert "NaN" in refused("quantize", path, "-o", tmp_path / "out", "--method", "rtn")


def test_integers_are_planned_for_export(ok, artefact):
    found = ok("plan", artefact, "--to", "onnx")
    assert found["quantize"] is None
    assert [v["runtime"] for v in found["runtimes"]] == ["ONNX Runtime GenAI"]
    assert found["size"]["artefact"] == (artefact / "model.safetensors").stat().st_size


def test_tables(tpvc, artefact):
    said = tpvc("plan", artefact, "--target", "cuda:90")
    assert said.exit_code == 0, said.stderr
    for part in ("what would help", "Marlin", "MatMulNBits", "Triton, cuda:90", "planned for export"):
        assert part in said.stdout


def test_adapters_and_a_folded_prompt(ok, refused, tiny_llama, write_adapter, tmp_path):
    road = write_adapter(tiny_llama, tmp_path / "loud")
    plain = ok("plan", tiny_llama, "--method", "rtn", "--group-size", 32, "--to", "onnx")
    banked = ok("plan", tiny_llama, "--method", "rtn", "--group-size", 32, "--to", "onnx", "--road", road)
    assert banked["runtimes"][0]["bytes"] > plain["runtimes"][0]["bytes"]
    assert banked["size"]["artefact"] == plain["size"]["artefact"]
    assert "no task 'a'" in refused("plan", tiny_llama, "--method", "rtn", "--task", "a")


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (("--group-size", 48), "does not divide"),
        (("--scheme", "W9"), "unknown scheme"),
        (("--bits", 8, "--activations", "fp8"), "at most 4 bits"),
        (("--target", "cuda:12"), "is not a target"),
        (("--fold",), "exactly one adapter"),
        (("--form", "prefix"), "without a prompt to fold"),
        (("--to", "gptq", "--portable"), "only onnx has one"),
        (("--to", "vllm", "--accuracy-level", 0), "only onnx has one"),
        (("--to", "onnx", "--target", "cuda:80"), "others none"),
        (("--dataset", "nowhere.txt", "--nsamples", 8), "nowhere.txt"),
        (("--seqlen", 4096), "context is 256"),
    ],
)
def test_bad_input(refused, tiny_llama, arguments, sentence):
    assert sentence in refused("plan", tiny_llama, *arguments)


def test_what_is_no_model(refused, tmp_path):
    assert "nowhere" in refused("plan", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert refused("plan", tmp_path)
