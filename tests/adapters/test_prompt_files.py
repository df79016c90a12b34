"""PEFT's prompt tuning directories, both ways, with PEFT itself; and what a directory may not hold."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tpvc.compiler.adapters import prompt_files
from tpvc.compiler.adapters.combine_prompts import applied, vector_of
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.sha256 import sha256

TOKENS, WIDTH = 5, 64
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def drawn(seed, rows=TOKENS, width=WIDTH):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def prompt(**known):
    return Prompt("own", drawn(1), drawn(2), **known)


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture
def directory(tmp_path):
    """A whole one, to be damaged."""
    prompt_files.write(prompt(base="b", tokenizer="t"), tmp_path / "own", {"name": "tiny"}, {"tpvc": "0"})
    return tmp_path / "own"


def held(wrapped):
    """The tensor of PEFT's prompt."""
    return wrapped.prompt_encoder["default"].embedding.weight.detach()


def config(directory, **changed):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_peft_loads_what_is_written_and_holds_the_same_tensor(directory, model):
    wrapped = peft.PeftModel.from_pretrained(model, directory)
    assert torch.equal(held(wrapped), drawn(1))
    found = wrapped.peft_config["default"]
    assert (found.num_virtual_tokens, found.token_dim, found.task_type) == (TOKENS, WIDTH, "CAUSAL_LM")


@torch.no_grad()
def test_peft_computes_with_a_sum_that_is_written(model, tmp_path):
    start = drawn(2)
    both = [prompt(), Prompt("b", drawn(3), start)]
    summed = applied("sum", both, start, vector_of("task_arithmetic", both), 0.5)
    prompt_files.write(summed, tmp_path / "sum", {}, {})
    ids = torch.tensor([[5, 9, 77, 200]])
    fed = torch.cat((start + 0.5 * (drawn(1) - start + drawn(3) - start), model.get_input_embeddings()(ids)[0]))
    wanted = model(inputs_embeds=fed[None]).logits[0, TOKENS:]
    found = peft.PeftModel.from_pretrained(model, tmp_path / "sum").eval()(input_ids=ids).logits[0, -4:]
    # four products of up to 128 terms in each of two layers and the head's, added up in another order
    torch.testing.assert_close(found, wanted, rtol=0, atol=(4 * 2 + 1) * 128 * 2**-24 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_directory_of_pefts_is_read_in_every_dtype(dtype, model, tmp_path):
    made = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(model, made).to(DTYPES[dtype])
    wrapped.save_pretrained(tmp_path / "theirs")
    (stored,) = load_file(tmp_path / "theirs" / "adapter_model.safetensors").values()
    assert stored.dtype == DTYPES[dtype]
    found = prompt_files.read(tmp_path / "theirs", "theirs")
    assert found.values.dtype == torch.float32 and torch.equal(found.values, held(wrapped).float())
    assert (found.start, found.base, found.tokenizer) == (None, None, None)
    assert found.origin["sha256"] == sha256(tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(TpvcError, match=r"'theirs' does not say which values it started from.*--start"):
        _ = found.vector


def test_ours_comes_back_with_its_start_and_fingerprints(directory):
    found = prompt_files.read(directory, "again")
    assert torch.equal(found.values, drawn(1)) and torch.equal(found.start, drawn(2))
    assert torch.equal(found.vector, drawn(1) - drawn(2))
    assert (found.name, found.base, found.tokenizer, found.tokens) == ("again", "b", "t", TOKENS)
    assert prompt_files.made(directory) == {
        "tpvc": "0",
        "artefact": "prompt",
        "base": {"name": "tiny", "weights": "b"},
        "tokenizer": "t",
    }


def test_the_same_prompt_gives_the_same_bytes_and_none_of_the_tensor_it_is_a_view_of(directory, tmp_path):
    whole = torch.cat((drawn(1), drawn(9)))
    half = replace(prompt(base="b", tokenizer="t"), values=whole[:TOKENS])
    prompt_files.write(half, tmp_path / "b", {"name": "tiny"}, {"tpvc": "0"})
    files = sorted(p.name for p in directory.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "start.safetensors", "tpvc.json"]
    assert all((directory / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_a_prompt_without_a_start_is_written_without_one(tmp_path):
    prompt_files.write(Prompt("bare", drawn(1)), tmp_path / "bare", {}, {})
    assert not (tmp_path / "bare" / "start.safetensors").exists()
    assert prompt_files.read(tmp_path / "bare", "bare").start is None


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "LORA", None])
def test_other_kinds_of_adapters_are_refused(directory, kind):
    config(directory, peft_type=kind)
    with pytest.raises(TpvcError, match=f"has peft_type = {kind!r}; expected 'PROMPT_TUNING'"):
        prompt_files.read(directory, "x")


@pytest.mark.parametrize("changed", [{"task_type": "SEQ_2_SEQ_LM"}, {"num_transformer_submodules": 2}])
def test_prompts_of_encoder_decoders_are_refused(directory, changed):
    config(directory, **changed)
    with pytest.raises(TpvcError, match="expected 'CAUSAL_LM', a prompt of a decoder"):
        prompt_files.read(directory, "x")


@pytest.mark.parametrize("changed", [{"token_dim": 63}, {"num_virtual_tokens": 6}, {"token_dim": None}])
def test_a_shape_that_is_not_the_configs_is_refused(directory, changed):
    config(directory, **changed)
    with pytest.raises(TpvcError, match=r"holds 5 vectors of 64 numbers, adapter_config.json says num_virtual_tokens"):
        prompt_files.read(directory, "x")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "start.safetensors"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(directory, file, bad):
    (name, values) = next(iter(load_file(directory / file).items()))
    values[2, 3] = bad
    save_file({name: values}, directory / file)
    with pytest.raises(TpvcError, match=f"{file} holds NaN or Inf"):
        prompt_files.read(directory, "x")


@pytest.mark.parametrize(
    "tensors, told",
    [
        ({"other": drawn(1)}, "holds other; expected one tensor called prompt_embeddings"),
        ({"prompt_embeddings": drawn(1).int()}, r"is I32 \[5, 64\]; expected \[virtual tokens, token_dim\]"),
        ({"prompt_embeddings": drawn(1)[0]}, r"is F32 \[64\]; expected"),
        ({"prompt_embeddings": drawn(1)[:0]}, r"is F32 \[0, 64\]; expected"),
    ],
)
def test_tensors_that_are_no_prompt_are_refused(directory, tensors, told):
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(TpvcError, match=told):
        prompt_files.read(directory, "x")


def test_a_start_of_another_shape_is_refused(directory):
    save_file({"start": drawn(1, rows=4)}, directory / "start.safetensors")
    with pytest.raises(TpvcError, match=r"start.safetensors holds \[4, 64\] numbers, the prompt \[5, 64\]"):
        prompt_files.read(directory, "x")


def test_pickle_is_refused_and_not_read(directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(TpvcError, match=r"as pickle .adapter_model.bin., which can run code when read and is refused"):
        prompt_files.read(directory, "x")


def test_damaged_directories_are_refused(directory, tmp_path):
    with pytest.raises(TpvcError, match=r"'.*none' is not a directory"):
        prompt_files.read(tmp_path / "none", "x")
    with pytest.raises(TpvcError, match=r"has no adapter_config.json"):
        prompt_files.read(tmp_path, "x")
    weights = (directory / "adapter_model.safetensors").read_bytes()
    (directory / "adapter_model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(TpvcError, match="is not a complete safetensors file"):
        prompt_files.read(directory, "x")
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(TpvcError, match=r"has no adapter_model.safetensors"):
        prompt_files.read(directory, "x")
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(TpvcError, match="cannot be read as JSON"):
        prompt_files.read(directory, "x")
