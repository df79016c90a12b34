"""`tpvc verify`: one table, one object, or one sentence."""

import json
import shutil

import pytest

FORMATS = ("gptq", "gptq_v2", "awq")


@pytest.fixture(scope="module")
def checkpoints(ok, artefact, tmp_path_factory):
    """The artefact in other formats, by name."""
    folder = tmp_path_factory.mktemp("formats")
    for name in FORMATS:
        ok("export", artefact, "-o", folder / name, "--to", name)
    return {name: folder / name for name in FORMATS}


def test_a_table(tpvc, artefact, exported, checkpoints):
    result = tpvc("verify", artefact, exported, *checkpoints.values())
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    lines = result.stdout.splitlines()
    assert [x.partition(": ")[2] for x in lines if not x.startswith("  ")] == [
        "compressed-tensors checkpoint",
        "ONNX folder",
        "GPTQ checkpoint",
        "GPTQ checkpoint",
        "AWQ checkpoint",
    ]
    assert sum(x.startswith("  proven ") for x in lines) == 12
    assert sum(x.startswith("  not proven  logits   transformers reads it through gptqmodel") for x in lines) == 3


def test_json(ok, artefact, exported):
    found = ok("verify", artefact, exported, "--no-logits")["findings"]
    assert [(f["target"], f["subject"], f["proven"]) for f in found] == [
        (str(artefact), "files", True),
        (str(exported), "files", True),
        (str(artefact), "numbers", True),
        (str(artefact), "logits", False),
        (str(exported), "numbers", True),
        (str(exported), "logits", False),
    ]


def test_the_first_difference_is_one_sentence(refused, artefact, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["awq"], tmp_path / "awq")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    assert "model.safetensors' has the SHA-256" in refused("verify", artefact, folder)
    (folder / "tpvc.json").unlink()
    assert f"; '{artefact}' holds" in refused("verify", artefact, folder)
    assert "nowhere" in refused("verify", artefact, tmp_path / "nowhere")
    assert "Missing argument" in refused("verify")


def test_someone_elses_checkpoint_runs_in_onnx(ok, checkpoints, tmp_path):
    """It is read, exported and proven like one of our own."""
    for name in FORMATS:
        (checkpoints[name] / "tpvc.json").rename(tmp_path / "kept.json")  # as others leave it
        ok("export", checkpoints[name], "-o", tmp_path / name, "--portable")
        found = ok("verify", checkpoints[name], tmp_path / name)["findings"]
        (tmp_path / "kept.json").rename(checkpoints[name] / "tpvc.json")
        told = [f for f in found if f["target"] == str(tmp_path / name)]
        assert all(f["proven"] for f in told) and len(told) == 4
        assert "14 integer matrices" in told[1]["said"]


def test_what_a_format_cannot_hold(refused, ok, tiny_llama, tmp_path):
    ok("quantize", tiny_llama, "-o", tmp_path / "w5", "--method", "rtn", "--bits", 5)
    said = refused("export", tmp_path / "w5", "-o", tmp_path / "gptq", "--to", "gptq")
    assert "'model.layers.0.self_attn.q_proj.weight' (W5" in said and "2, 3, 4, 8 bits" in said
    assert "AWQ" in refused("export", tmp_path / "w5", "-o", tmp_path / "awq", "--to", "awq")
    assert not (tmp_path / "gptq").exists() and not (tmp_path / "gptq.partial").exists()


def test_the_manifest_says_what_it_was_made_of(artefact, checkpoints):
    told = json.loads((checkpoints["gptq"] / "tpvc.json").read_text())
    assert told["artefact"] == "gptq" and told["source"]["name"] == str(artefact)
    assert told["files"]["model.safetensors"] and len(told["notes"]) == 2


def test_settings_beside_the_config_are_not_transformers_to_judge(ok, checkpoints, tmp_path):
    """As AutoGPTQ left them: transformers would make up random weights, so it is not asked."""
    folder = shutil.copytree(checkpoints["gptq"], tmp_path / "old")
    (folder / "tpvc.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(config))
    found = ok("verify", checkpoints["gptq"], folder)["findings"]
    said = [f["said"] for f in found if f["target"] == str(folder)]
    assert any("its config.json does not say how it is quantised" in s for s in said)
