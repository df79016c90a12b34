"""What a user may name as a model, and what is said about a name that is none."""

from dataclasses import replace

import huggingface_hub
import pytest
import tokenizers
import transformers as hf
from huggingface_hub.utils import filter_repo_objects

from tpvc.compiler import program as program_file
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load, manifest, tokenizer


@pytest.fixture
def directory(tmp_path):
    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_directory_as_text_or_path(directory):
    assert load(directory).source.name == load(str(directory)).source.name == str(directory)


def test_a_hub_id_is_fetched_without_pickles(directory, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: asked.update(name=name, **options) or str(directory),
    )
    assert load("owner/model-1.5").source.name == "owner/model-1.5"
    assert asked["name"] == "owner/model-1.5"
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["allow_patterns"])
    there = ["model.safetensors", "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "config.json"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(there, **patterns)) == ["model.safetensors", "config.json"]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host\nand many more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(TpvcError, match="no route to host") as caught:
        load("owner/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "./owner/model", "/no/such/place", "a/b/c", "models/x.gguf", "~/none", ""])
def test_a_path_that_does_not_exist(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    if name == "":
        name = "missing directory"
    with pytest.raises(TpvcError, match="there is no"):
        load(name)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(TpvcError, match=r"\.gguf"):
        load(path)


def test_the_tokenizer_beside_the_weights(directory):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    assert tokenizer(load(directory))("a b a")["input_ids"] == [0, 1, 0]


def test_weights_are_hashed_once_and_only_when_asked_for(directory, monkeypatch):
    hashed = []
    monkeypatch.setattr(program_file, "sha256", lambda path: hashed.append(path.name) or "ab")
    program = load(directory)
    assert hashed == []
    assert program.source.files == program.source.files == {"model.safetensors": "ab"}
    assert hashed == ["model.safetensors"]


def test_the_manifest_beside_the_weights(directory):
    assert manifest(load(directory)) is None
    (directory / "tpvc.json").write_text('{"made_by": "something else of that name"}')
    assert manifest(load(directory)) is None
    (directory / "tpvc.json").write_text('{"tpvc": "0.1.0"}')
    program = load(directory)
    assert manifest(program) == {"tpvc": "0.1.0"}
    beside = replace(program, source=replace(program.source, weights=(directory / "m.gguf",)))
    assert manifest(beside) is None, "what lies beside a GGUF is not its own"
