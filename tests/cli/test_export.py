"""`tpvc export`: a folder that runs, or one sentence."""

import json
import os

from tpvc.compiler.cli.options import TO
from tpvc.compiler.export_pipeline import EXPORTS


def test_leaves_a_folder_for_genai(exported):
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "tpvc.json"} <= set(os.listdir(exported))


def test_table_and_next_step(tpvc, artefact, tmp_path):
    result = tpvc("export", artefact, "-o", tmp_path / "onnx")
    assert result.exit_code == 0, result.stderr
    assert "model.onnx" in result.stdout
    assert f"tpvc run {tmp_path / 'onnx'}" in result.stdout


def test_portable_adds_a_twin_in_standard_operators(ok, artefact, tmp_path):
    import onnx

    found = ok("export", artefact, "-o", tmp_path / "onnx", "--portable")
    assert {"model.onnx", "portable/model.onnx"} <= found["files"].keys()
    twin = onnx.load(tmp_path / "onnx" / "portable" / "model.onnx", load_external_data=False)
    assert {o.domain for o in twin.opset_import} <= {"", "ai.onnx"}


def test_a_float_model_is_exported_in_float(ok, tiny_llama, tmp_path):
    ok("export", tiny_llama, "-o", tmp_path / "onnx")
    assert ok("inspect", tmp_path / "onnx")["matmulnbits"] == {}


def test_the_vllm_layout_holds_the_same_integers(ok, artefact, tmp_path):
    import torch

    from tpvc.compiler import frontends
    from tpvc.compiler.program import grid_of, read

    ok("export", artefact, "-o", tmp_path / "vllm", "--to", "vllm")
    ours, theirs = frontends.load(artefact), frontends.load(tmp_path / "vllm")
    integers = [n for n, p in ours.params.items() if grid_of(p)]
    assert len(integers) == 15
    for name in integers:
        a, b = read(ours.params[name]), read(theirs.params[name])
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
        assert a.zero is None if b.zero is None else torch.equal(a.zero, b.zero)


def test_output_that_is_not_ours(refused, artefact, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "did not write" in refused("export", artefact, "-o", tmp_path, "--overwrite")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_overwrite(refused, ok, artefact, tmp_path):
    out = tmp_path / "onnx"
    ok("export", artefact, "-o", out)
    assert "--overwrite" in refused("export", artefact, "-o", out)
    ok("export", artefact, "-o", out, "--overwrite", "--accuracy-level", 0)
    assert json.loads((out / "tpvc.json").read_text())["options"]["accuracy_level"] == 0


def test_bad_input(refused, tmp_path):
    assert "nowhere" in refused("export", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert "gguf" in refused("export", tmp_path / "nowhere", "-o", tmp_path / "out", "--to", "gguf")
    for option in (("--portable",), ("--accuracy-level", 4)):
        said = refused("export", tmp_path / "nowhere", "-o", tmp_path / "out", "--to", "awq", *option)
        assert "awq folder; only onnx has one" in said
    assert not any(tmp_path.iterdir())


def test_to_names_every_runtime():
    assert sorted(TO.choices) == sorted(EXPORTS)
