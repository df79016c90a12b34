"""One test for each class of what fuzzing found (`tests/fuzz`), and what must not be in the code at all."""

import ast
import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tpvc.compiler.adapters import prompt_recipe
from tpvc.compiler.cli import cli, inspect_export
from tpvc.compiler.documents import documents
from tpvc.compiler.engines.genai_folder import carried_prompts
from tpvc.compiler.errors import TpvcError, printable, short
from tpvc.compiler.frontends import gguf, load
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.frontends.weights import read_json, stored_in
from tpvc.compiler.tuning import importance_file
from tpvc.compiler.verification import files

ROOT = Path(__file__).parents[1]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**33, "num_attention_heads": 1},
        {"head_dim": 10**11},
        {"max_position_embeddings": 2**31 - 1},
        {"vocab_size": 10**400},
        {"rms_norm_eps": 10**400},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": 10**400},
        {"rope_theta": 5e-324},
        {"rope_scaling": YARN | {"beta_fast": 5e-324}},
        {"rope_scaling": YARN | {"factor": float("inf")}},
        {"rope_scaling": {"rope_type": ["yarn"]}},
        {"eos_token_id": [2**70]},
        {"num_attention_heads": -2},
    ],
    ids=str,
)
def test_absurd_numbers_in_a_config(changed):
    assert architecture(LLAMA).facts.layers == 1
    tracemalloc.start()
    with pytest.raises(TpvcError):
        architecture(LLAMA | changed)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_a_config_is_a_file_of_bounded_size(tmp_path):
    path = tmp_path / "config.json"
    path.symlink_to("/dev/zero")
    with pytest.raises(TpvcError, match="no regular file"):
        read_json(path)
    with pytest.raises(TpvcError, match="no regular file"):
        stored_in(path)
    path.unlink()
    path.touch()
    os.truncate(path, 1 << 40)  # takes no room
    with pytest.raises(TpvcError, match="no regular file of at most"):
        read_json(path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..\\x"])
def test_an_index_that_leads_outside(tmp_path, name):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "outside.safetensors")
    (model / "config.json").write_text(json.dumps(LLAMA))
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TpvcError, match="outside of the directory"):
        load(model)


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "\0", "."])
def test_an_index_with_names_that_no_file_has(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TpvcError, match="lacks 1 of the 1 files"):
        load(tmp_path)


@pytest.mark.parametrize("told", [{"ignore": ["re:(.*)*!"]}, {"config_groups": {"g": {"targets": ["re:(a|a)+$"]}}}])
def test_a_quantization_config_that_would_match_for_ever(tmp_path, told):
    weights = {"num_bits": 4, "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights} | told.get("config_groups", {}).get("g", {})
    given = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}
    given |= {"ignore": told.get("ignore", [])}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": given}))
    with pytest.raises(TpvcError, match="too many ways to match"):
        load(tmp_path)


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"text": ' + "[" * 900 + "]" * 900 + "}", "nested deeper"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
        ('{"text": "a\\ud800"}', "half a character"),
        ('{"text": "a", "text": "b"}', "stands twice"),
    ],
)
def test_records_of_text(tmp_path, line, said):
    path = tmp_path / "text.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TpvcError, match=said):
        list(documents(path, str).texts)


def test_a_table_that_unfolds(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "bomb.parquet"
    table = pyarrow.table({"text": pyarrow.array(["x" * 100_000] * 2000)})
    parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 1 << 17
    with pytest.raises(TpvcError, match="times its own size"):
        list(documents(path, str).texts)


def test_a_recipe_of_a_billion_prompts(tmp_path):
    path = tmp_path / "recipe.yaml"
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path.write_text("\n".join([*lines, "prompts: *a11"]))
    with pytest.raises(TpvcError, match="alias"):
        prompt_recipe.read(path)
    path.write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(TpvcError, match="not plain YAML"):
        prompt_recipe.read(path)
    for text in (f"prompts: [{{prompt: {'x' * 300}}}]", f"prompts: [{{prompt: a}}]\nmodel: {'x' * 300}"):
        path.write_text(text)
        with pytest.raises(TpvcError, match="longer than a file's name"):
            prompt_recipe.read(path)
    path.write_text("#" * (2 << 20))
    with pytest.raises(TpvcError, match="at most"):
        prompt_recipe.read(path)


TOLD = {"version": 1, "method": "path", "base": None, "train": "weights", "targets": "all", "rank": None}
TOLD |= {"layers": {"a": 0}}


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": None},
        {"layers": {"a": 7}},
        {"layers": {"a": -1}},
        {"layers": {"b": 0}},
        {"layers": {"a": True}},
        {"base": 3},
        {"method": []},
        {"rank": "8"},
    ],
    ids=str,
)
def test_the_metadata_of_an_importance_file(tmp_path, changed):
    tensors = {"importance.a": torch.zeros(4, dtype=torch.uint8), "top.a": torch.ones(())}
    tensors["layer_coefficient"] = torch.ones(1)
    path = tmp_path / "importance"
    save_file(tensors, path, {"tpvc": json.dumps(TOLD)})
    assert importance_file.read(path).coefficients == {"a": 1.0}
    save_file(tensors, path, {"tpvc": json.dumps(TOLD | changed)})
    with pytest.raises(TpvcError, match="damaged"):
        importance_file.read(path)
    save_file(tensors, path, {"tpvc": "[" * 5000})
    with pytest.raises(TpvcError, match="not an importance file"):
        importance_file.read(path)
    save_file(tensors | {"layer_coefficient": torch.ones(1, 2)}, path, {"tpvc": json.dumps(TOLD)})
    with pytest.raises(TpvcError, match="damaged"):
        importance_file.read(path)


def written_gguf(path, pairs: bytes, counts=(0, 1)):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + pairs)
    return path


def test_an_array_of_numbers_takes_no_more_than_its_bytes(tmp_path):
    count = 1 << 20
    key = b"tokenizer.ggml.scores"
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, count) + bytes(count)
    path = written_gguf(tmp_path / "a.gguf", pair)
    tracemalloc.start()
    with pytest.raises(TpvcError, match="architecture None"):
        gguf.load(path, "a")
    assert tracemalloc.get_traced_memory()[1] < 8 * count
    tracemalloc.stop()


@pytest.mark.parametrize("counts", [(2**63, 0), (0, 2**63), (1 << 20, 0)])
def test_counts_of_a_gguf_are_bounded(tmp_path, counts):
    with pytest.raises(TpvcError, match="at most"):
        gguf.load(written_gguf(tmp_path / "a.gguf", bytes(1000), counts), "a")


def test_texts_of_a_gguf_are_bounded(tmp_path):
    pair = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 8, 1 << 40) + bytes(100)
    with pytest.raises(TpvcError, match="at most"):
        gguf.load(written_gguf(tmp_path / "a.gguf", pair), "a")


def test_a_manifest_that_lists_what_lies_elsewhere(tmp_path):
    (tmp_path / "outside").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("../outside", str(tmp_path / "outside")):
        (folder / "tpvc.json").write_text(json.dumps({"files": {name: "00"}}))
        with pytest.raises(TpvcError, match="outside of the folder"):
            files.check(folder)


def test_a_genai_folder_that_names_what_lies_elsewhere(tmp_path):
    decoder = {"filename": "../model.onnx"}
    told = {"model": {"vocab_size": 1, "context_length": 1, "decoder": decoder}}
    (tmp_path / "genai_config.json").write_text(json.dumps(told))
    with pytest.raises(TpvcError, match="lacks what"):
        inspect_export.onnx_facts(tmp_path)


@pytest.mark.parametrize("prompt", [{"tokens": 10**12}, {"tokens": -1}, {"first_id": -5}, {"first_id": 2**40}])
def test_prompts_of_a_genai_folder_are_bounded(tmp_path, prompt):
    told = {"prompts": [{"name": "a", "first_id": 4, "tokens": 2} | prompt]}
    (tmp_path / "tpvc.json").write_text(json.dumps(told))
    with pytest.raises(TpvcError, match="lists a prompt"):
        carried_prompts(tmp_path)


def test_prompts_of_a_genai_folder_take_no_memory_until_one_is_used(tmp_path):
    told = {"prompts": [{"name": str(i), "first_id": 4, "tokens": 2**24 - 1} for i in range(1000)]}
    (tmp_path / "tpvc.json").write_text(json.dumps(told))
    assert set(carried_prompts(tmp_path).values()) == {range(4, 4 + 2**24 - 1)}


def test_numbers_beside_an_onnx_graph_lie_beside_it(tmp_path):
    import onnx

    from tpvc.compiler.verification import onnx_numbers

    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4], np.zeros(4, np.float32).tobytes(), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for location in ("../outside", str(tmp_path / "outside"), "missing"):
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=location)
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (tmp_path / "outside").write_bytes(bytes(16))
        graph = onnx.helper.make_graph([], "g", [], [], [tensor])
        (folder / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
        with pytest.raises(TpvcError, match="expected a file beside it"):
            onnx_numbers.opened(folder / "model.onnx")


def test_errors_do_not_move_the_cursor(tmp_path):
    """A name from a file, in the sentence that the command line prints."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "\x1b[2J\x9b31m"}))
    save_file({"a\x1b[2J": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = CliRunner().invoke(cli, ["inspect", str(tmp_path)])
    assert found.exit_code == 2 and "\x1b" not in found.output and "a\\x1b[2J" in found.output
    assert printable("a\x1b\x9b\ud800é\n") == "a\\x1b\\x9b\\ud800é\n"


def test_errors_are_short():
    value = [[["x" * 10_000] * 1000] * 1000] * 1000
    assert len(short(value)) < 1000
    with pytest.raises(TpvcError) as error:
        architecture(LLAMA | {"hidden_act": value})
    assert len(str(error.value)) < 1500


def test_a_pickle_beside_a_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(TpvcError, match="pickle"):
            load(tmp_path)
        (tmp_path / name).unlink()


def calls(tree):
    """(dotted name of what is called, its keywords)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_in_the_code_runs_what_it_reads():
    """The one pickle goes through a pipe between a build and the compilers that it started."""
    sources = [p for room in ("compiler", "passes", "kernels") for p in (ROOT / room).rglob("*.py")]
    assert len(sources) > 100
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        if path.name != "aot.py":
            assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
        for name, keywords in calls(tree):
            assert name not in ("eval", "exec", "torch.load", "np.load", "numpy.load", "os.system"), (path, name)
            if name.endswith("yaml.load"):
                assert "SafeLoader" in path.read_text(encoding="utf-8"), path
            assert keywords.get("trust_remote_code", "False") == "False", path
            if name.endswith(".from_pretrained"):
                said = path.read_text(encoding="utf-8")
                assert "trust_remote_code" in keywords or '"trust_remote_code": False' in said, (path, name)


def test_code_named_by_a_checkpoint_is_not_run(tiny_llama, tmp_path, monkeypatch):
    """The config names a class in a file beside it; nothing imports that file, whatever is answered."""
    for source in tiny_llama.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    found = CliRunner().invoke(cli, ["verify", str(tmp_path)])
    assert found.exit_code == 0 and not (tmp_path / "ran").exists()
    assert load_file(tmp_path / "model.safetensors")
