"""What is sent to vLLM: decoded as vLLM does, and fed to transformers, it gives the tokens of `tpvc run --task`."""

import base64
import io
import json

import pytest
import torch

from tpvc.compiler import frontends
from tpvc.compiler.adapters import prompt_files
from tpvc.compiler.adapters.prompt import Prompt


@pytest.fixture
def directory(tiny_llama, tmp_path):
    program = frontends.load(tiny_llama)
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    prompt = Prompt("task", values, base=prompt_files.base_print(program))
    prompt_files.write(prompt, tmp_path / "task", prompt_files.about(program), {})
    return tmp_path / "task"


@pytest.mark.parametrize("raw", [True, False])
def test_the_request_is_the_prompt_and_the_text(tpvc, ok, tiny_llama, directory, tmp_path, raw):
    import transformers

    given = ("--task", directory, *(["--raw"] if raw else []))
    result = tpvc("prompt", "embeds", tiny_llama, "The quick", *given, "--served", "tiny", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.stderr
    request = json.loads(result.stdout)
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("tiny", 12, 0)
    vectors = torch.load(io.BytesIO(base64.b64decode(request["prompt_embeds"])), weights_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    mask = torch.ones(1, len(vectors), dtype=torch.int64)
    found = model.generate(inputs_embeds=vectors[None], attention_mask=mask, max_new_tokens=12, do_sample=False)
    told = ok("run", tiny_llama, "The quick", "--task", directory, *(["--raw"] if raw else []), "--max-new-tokens", 12)
    assert found[0].tolist()[: len(told["tokens"])] == told["tokens"]
    assert len(vectors) == told["prompt_tokens"]
    tpvc("prompt", "embeds", tiny_llama, "The quick", *given, "-o", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["prompt_embeds"] == request["prompt_embeds"]


def test_an_answer_ends_where_the_context_does(tpvc, refused, tiny_llama, directory):
    words = 240 * "\n"
    result = tpvc("prompt", "embeds", tiny_llama, words, "--raw", "--task", directory)
    assert json.loads(result.stdout)["max_tokens"] == 256 - 240 - 5
    said = refused("prompt", "embeds", tiny_llama, words + 11 * "\n", "--raw", "--task", directory)
    assert "the prompt has 256 tokens, the model's context holds 256" in said


def test_only_a_new_file_is_written(refused, tiny_llama, directory):
    before = (directory / "adapter_config.json").read_bytes()
    for place in (directory / "adapter_config.json", directory / "none" / "r.json"):
        assert "expected the name of a new file" in refused(
            "prompt", "embeds", tiny_llama, "The", "--task", directory, "-o", place
        )
    assert (directory / "adapter_config.json").read_bytes() == before


def test_text_that_is_not_utf8(refused, tiny_llama, directory):
    said = refused("prompt", "embeds", tiny_llama, "a\udcff", "--raw", "--task", directory)
    assert "the prompt is not UTF-8 at character 1" in said


def test_an_unknown_task_is_one_sentence(refused, tiny_llama):
    assert "no task 'x'; it has none" in refused("prompt", "embeds", tiny_llama, "The", "--task", "x")


def test_gemma_2_is_sent_without_the_factor_that_vllm_multiplies_by(tpvc, tmp_path, tiny_tokenizer):
    """Its vectors times the root of the width are what enters the model; those of Gemma 3 are that already."""
    import transformers

    small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    for kind, config in (("2", transformers.Gemma2Config), ("3", transformers.Gemma3TextConfig)):
        model = transformers.AutoModelForCausalLM.from_config(config(**small))
        model.save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
        program = frontends.load(tmp_path / kind)
        values = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        prompt = Prompt("task", values, base=prompt_files.base_print(program))
        prompt_files.write(prompt, tmp_path / f"task{kind}", prompt_files.about(program), {})
        result = tpvc("prompt", "embeds", tmp_path / kind, "The quick", "--raw", "--task", tmp_path / f"task{kind}")
        assert result.exit_code == 0, result.stderr
        sent = base64.b64decode(json.loads(result.stdout)["prompt_embeds"])
        vectors = torch.load(io.BytesIO(sent), weights_only=True)
        torch.testing.assert_close(vectors[:5] * (32**0.5 if kind == "2" else 1), values, rtol=2**-22, atol=0)
