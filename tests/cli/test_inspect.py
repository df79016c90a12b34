"""`tpvc inspect`: facts about a model, an artefact and a folder."""

import json
import shutil

import peft
from transformers import AutoModelForCausalLM


def test_model(ok, tiny_llama):
    found = ok("inspect", tiny_llama)
    assert found["facts"]["family"] == "llama"
    assert found["facts"]["blocks"] == 2
    assert found["grids"] == {"float32": 15}
    assert found["operators"]["linear"] == 15
    assert found["provenance"] is None


def test_artefact(ok, artefact, tiny_llama):
    found = ok("inspect", artefact)
    assert found["grids"] == {"W4 g32 asymmetric": 14, "W8 per channel symmetric": 1}
    assert found["provenance"]["source"]["name"] == str(tiny_llama)
    assert float(found["facts"]["bits a weight, loaded"]) < 16


def test_damaged_provenance(refused, artefact, exported, tmp_path):
    for i, target in enumerate((artefact, exported)):
        shutil.copytree(target, tmp_path / str(i))
        (tmp_path / str(i) / "tpvc.json").write_text("{")
        assert "tpvc.json" in refused("inspect", tmp_path / str(i))


def test_folder(ok, exported):
    found = ok("inspect", exported)
    assert found["operators"]["GroupQueryAttention"] == 2
    assert sum(found["matmulnbits"].values()) == found["operators"]["MatMulNBits"]
    assert all("accuracy level 0" in layout for layout in found["matmulnbits"] if layout.startswith("4"))
    assert found["facts"]["context_length"] == 256


def test_folder_tells_the_model_it_was_made_from(ok, tpvc, exported, artefact, tiny_llama):
    source = ok("inspect", exported)["provenance"]["source"]
    assert source["name"] == str(artefact)
    assert source["manifest"]["source"]["name"] == str(tiny_llama)
    assert source["manifest"]["options"]["method"] == "rtn"
    assert "blocks" not in source["manifest"]
    said = tpvc("inspect", exported).stdout
    assert f"from {artefact}" in said and f"from {tiny_llama}" in said
    assert "RoundToNearest (W4 g32 asymmetric)" in said


def test_no_weight_is_read(ok, artefact, tiny_llama, monkeypatch):
    from tpvc.compiler import program

    monkeypatch.setattr(program, "sha256", lambda path: 1 / 0)
    for target in (tiny_llama, artefact):
        assert list(ok("inspect", target)["files"]) == ["model.safetensors"]


def test_tables(tpvc, artefact, exported):
    listed = tpvc("inspect", artefact, "--all")
    assert listed.exit_code == 0, listed.stderr
    assert "model.layers.1.mlp.down_proj" in listed.stdout
    assert "provenance" in listed.stdout
    assert "MatMulNBits" in tpvc("inspect", exported).stdout


def test_a_portable_graph_alone(ok, tpvc, exported, tmp_path):
    """What is left of an export where another runtime takes its standard graph."""
    (tmp_path / "portable").mkdir()
    shutil.copy(exported / "model.onnx", tmp_path / "portable" / "model.onnx")
    found = ok("inspect", tmp_path)
    assert found["kind"].startswith("a portable graph") and list(found["files"]) == ["portable/model.onnx"]
    assert found["matmulnbits"] == ok("inspect", exported)["matmulnbits"]
    told = tpvc("inspect", tmp_path)
    assert told.exit_code == 0 and "\noperators" in told.stdout


def test_bad_input(refused, tmp_path):
    model = {"vocab_size": 1, "context_length": 1, "decoder": {"filename": "model.onnx"}}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model}))
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    assert "model.onnx" in refused("inspect", tmp_path)
    for damaged in ("{}", "[]", "{", '{"model": {}}'):
        (tmp_path / "genai_config.json").write_text(damaged)
        assert "genai_config.json" in refused("inspect", tmp_path)
    assert "nowhere" in refused("inspect", tmp_path / "nowhere")


def test_adapters_and_a_merged_checkpoint(ok, tpvc, refused, write_adapter, tiny_llama, tmp_path):
    road = write_adapter(tiny_llama, tmp_path / "loud")
    ok("quantize", tiny_llama, "-o", tmp_path / "w4", "--method", "rtn", "--group-size", 32, "--road", road)
    assert "is an adapter; expected its base model" in refused("eval", road)
    facts = ok("inspect", tmp_path / "w4")
    assert facts["adapters"] == {"loud": "road_1 in groups of 8, on 14 linears, 1,024 numbers"}
    assert facts["facts"]["parameters"] == ok("inspect", tiny_llama)["facts"]["parameters"]
    assert "loud" in tpvc("inspect", tmp_path / "w4").stdout
    ok("road", "merge", tiny_llama, "--road", road, "-o", tmp_path / "merged")
    shown = tpvc("inspect", tmp_path / "merged")
    assert shown.exit_code == 0 and "passes: FoldRoad" in shown.stdout


def test_what_was_trained_beside_a_model(ok, refused, tiny_llama, write_adapter, tmp_path):
    write_adapter(tiny_llama, tmp_path / "road")
    found = ok("inspect", tmp_path / "road")
    assert found["kind"] == "a RoAd adapter" and found["facts"]["variant"] == "road_1"
    assert found["facts"]["linears"] == "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "prompt")
    found = ok("inspect", tmp_path / "prompt")
    assert found["kind"] == "a soft prompt" and found["facts"]["virtual tokens"] == 5
    width = found["facts"]["features"]
    assert found["facts"]["numbers"] == f"{5 * width} in 1 tensor (F32)" and found["provenance"] is None
    (tmp_path / "text.txt").write_text("The river rises in the mountains. " * 40)
    out = tmp_path / "a.importance"
    ok("importance", tiny_llama, "--data", tmp_path / "text.txt", "-o", out, "--nsamples", 20, "--max-length", 16)
    found = ok("inspect", out)
    assert found["kind"] == "an importance file" and found["facts"]["method"] == "path"
    (tmp_path / "road/adapter_model.safetensors").unlink()
    assert "expected both" in refused("inspect", tmp_path / "road")
