"""What all adapters' directories share: which are refused, which linears target_modules names, and what is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpvc.compiler.adapters import peft_directory
from tpvc.compiler.adapters.peft_directory import CONFIG, PICKLE, WEIGHTS
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.program import linears


@pytest.fixture
def directory(tmp_path):
    peft_directory.write(tmp_path / "a", {"peft_type": "ROAD"}, {WEIGHTS: {"x": torch.ones(2)}}, {"artefact": "road"})
    return tmp_path / "a"


def test_a_config_of_its_kind_is_read_and_others_are_refused(directory):
    assert peft_directory.read_config(directory, "ROAD", "a RoAd adapter") == {"peft_type": "ROAD"}
    with pytest.raises(TpvcError, match=r"has peft_type = 'ROAD'; expected 'LORA', a LoRA adapter$"):
        peft_directory.read_config(directory, "LORA", "a LoRA adapter")
    (directory / CONFIG).unlink()
    with pytest.raises(TpvcError, match=r"has no adapter_config.json; expected the directory of a LoRA adapter$"):
        peft_directory.read_config(directory, "LORA", "a LoRA adapter")
    with pytest.raises(TpvcError, match=r"is not a directory; expected one with adapter_config.json and"):
        peft_directory.read_config(directory / WEIGHTS, "LORA", "a LoRA adapter")


def test_pickle_is_refused_and_what_is_missing_is_named(directory):
    assert torch.equal(peft_directory.open_tensors(directory / WEIGHTS, "a RoAd adapter")["x"].read(), torch.ones(2))
    (directory / WEIGHTS).unlink()
    with pytest.raises(TpvcError, match=r"has no adapter_model.safetensors; expected the directory of a RoAd adapter$"):
        peft_directory.open_tensors(directory / WEIGHTS, "a RoAd adapter")
    torch.save({}, directory / PICKLE)
    with pytest.raises(TpvcError, match=r"pickle \(adapter_model.bin\), which can run code .* load it with PEFT"):
        peft_directory.open_tensors(directory / WEIGHTS, "a RoAd adapter")


def test_targets_are_last_names_only_where_these_mean_the_same(tiny_llama):
    program = load(tiny_llama)
    every = [n.name for n in linears(program.nodes) if n.name.endswith(("q_proj", "down_proj"))]
    assert len(every) > 2
    assert peft_directory.targets(every, program) == ["down_proj", "q_proj"]
    assert peft_directory.targets(every[1:], program) == sorted(every[1:])


def test_what_is_written_is_float32_and_the_same_bytes_again(tmp_path):
    """A view, in another dtype and with a gradient, is stored as its values are."""
    value = torch.arange(6, dtype=torch.bfloat16).view(2, 3).requires_grad_().T
    for name in "ab":
        peft_directory.write(tmp_path / name, {"r": 1}, {WEIGHTS: {"x": value}}, {"artefact": "lora"})
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab")
    assert one == two and sorted(one) == [CONFIG, WEIGHTS, "tpvc.json"]
    assert torch.equal(load_file(tmp_path / "a" / WEIGHTS)["x"], value.detach().float())
    assert json.loads(one["tpvc.json"]) == {"artefact": "lora"} and json.loads(one[CONFIG]) == {"r": 1}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(TpvcError, match=r"file' cannot be written \(.*\); choose another place"):
        peft_directory.write(tmp_path / "file", {}, {}, {})
