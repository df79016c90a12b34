"""Soft prompts on their way through the commands: rounded under them, carried, exported in every form, run."""

import json

import pytest
import torch

from tpvc.compiler import frontends
from tpvc.compiler.adapters import prompt_files
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.interpret import generate
from tpvc.passes.block import behind_prompts
from tpvc.passes.fold_prompt import FoldPrompt

ROUND = ("--bits", 4, "--group-size", 32, "--nsamples", 12, "--seqlen", 24, "--iters", 3)
TEXT = "The quick brown"


def write(model, directory, tokens, seed=0):
    program = frontends.load(model)
    values = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(seed)) * 0.05
    vocabulary = prompt_files.tokenizer_print(frontends.tokenizer(program))
    prompt = Prompt(directory.name, values[0], values[1], prompt_files.base_print(program), vocabulary)
    prompt_files.write(prompt, directory, prompt_files.about(program), {})
    return directory


@pytest.fixture(scope="module")
def prompts(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    return [write(tiny_llama, folder / name, tokens, i) for i, (name, tokens) in enumerate((("a", 6), ("b", 3)))]


@pytest.fixture(scope="module")
def carried(ok, tiny_llama, prompts, tmp_path_factory):
    """An artefact under two prompts."""
    out = tmp_path_factory.mktemp("carried") / "w4"
    given = [x for p in prompts for x in ("--prompt", f"{p.name}={p}")]
    return out, ok("quantize", tiny_llama, "-o", out, *ROUND, *given)["manifest"]


def greedy(program, task, count=12):
    ids = torch.tensor(frontends.tokenizer(program)(TEXT)["input_ids"])
    return list(generate(program, ids, count, task=task))


def test_the_artefact_carries_them_and_the_rounding_knew_them(carried, prompts, ok, tiny_llama, tmp_path):
    out, told = carried
    assert [(p["name"], p["tokens"]) for p in told["prompts"]] == [("a", 6), ("b", 3)]
    assert told["passes"][0] == {"name": "BankPrompt", "prompts": ["a", "b"]}
    program = frontends.load(out)
    for prompt, directory in zip(program.prompts, prompts, strict=True):
        given = prompt_files.read(directory, "x")
        assert torch.equal(prompt.values, given.values) and torch.equal(prompt.start, given.start)
        assert prompt.base == given.base and prompt.tokenizer == given.tokenizer
    ok("quantize", tiny_llama, "-o", tmp_path / "without", *ROUND)
    with_, without = ((p / "model.safetensors").read_bytes() for p in (out, tmp_path / "without"))
    assert with_ != without


def test_transformers_and_peft_read_the_artefact(carried):
    import peft
    import transformers

    out, _ = carried
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    model = peft.PeftModel.from_pretrained(model, out / "prompts" / "b").eval()
    ids = torch.tensor([frontends.tokenizer(frontends.load(out))(TEXT)["input_ids"]])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert found[0, ids.shape[1] :].tolist()[:12] == greedy(frontends.load(out), "b")[:12]


def test_windows_begin_with_every_prompt_in_turn(carried):
    program = frontends.load(carried[0])
    windows = torch.arange(120).view(6, 20)
    made = behind_prompts(windows, program)
    for i, (first, tokens) in enumerate(((0, 0), (384, 6), (390, 3)) * 2):
        assert made[i, :tokens].tolist() == list(range(first, first + tokens))
        assert torch.equal(made[i, tokens:], windows[i, : 20 - tokens])


def test_run_with_a_task(carried, ok, refused, tiny_llama, prompts):
    out, _ = carried
    program = frontends.load(out)
    for task in ("a", "b", None):
        given = () if task is None else ("--task", task)
        told = ok("run", out, TEXT, "--raw", "--max-new-tokens", 12, *given)
        assert told["tokens"] == greedy(program, task)
    assert "no task 'c'; it has a, b" in refused("run", out, TEXT, "--task", "c")
    beside = ok("run", tiny_llama, TEXT, "--raw", "--max-new-tokens", 12, "--task", prompts[0])["tokens"]
    assert beside == greedy(frontends.with_prompts(frontends.load(tiny_llama), {"x": prompts[0]}), "x")


def test_exported_as_virtual_tokens(carried, ok, refused, tmp_path):
    out, folder = carried[0], tmp_path / "onnx"
    ok("export", out, "-o", folder, "--accuracy-level", 0)
    told = json.loads((folder / "tpvc.json").read_text())["prompts"]
    assert [(p["name"], p["first_id"], p["tokens"]) for p in told] == [("a", 384, 6), ("b", 390, 3)]
    program = frontends.load(out)
    for task in ("a", "b", None):
        given = () if task is None else ("--task", task)
        told = ok("run", folder, TEXT, "--raw", "--max-new-tokens", 12, *given)
        assert told["tokens"] == greedy(program, task)
    assert "no task 'c'; it has a, b" in refused("run", folder, TEXT, "--task", "c")
    assert ok("inspect", folder)["prompts"]["b"] == "3 virtual tokens, ids 390 to 392"
    manifest = json.loads((folder / "tpvc.json").read_text())
    for listed in (5, ["a"], [{"name": "a", "tokens": 6}], [{"name": "a", "first_id": None, "tokens": 6}]):
        (folder / "tpvc.json").write_text(json.dumps({**manifest, "prompts": listed}))
        for command in (("run", folder, TEXT, "--task", "a"), ("inspect", folder)):
            assert "lists a prompt without its name, ids and length" in refused(*command)


def test_exported_with_one_task_folded_in(carried, ok, tpvc, refused, tmp_path):
    out, folder = carried[0], tmp_path / "onnx"
    ok("export", out, "-o", folder, "--accuracy-level", 0, "--task", "a")
    told = json.loads((folder / "tpvc.json").read_text())
    assert told["prompts"] == [] and (told["folded"]["name"], told["folded"]["form"]) == ("a", "kv")
    assert json.loads((folder / "genai_config.json").read_text())["model"]["context_length"] == 256 - 6
    found = ok("run", folder, TEXT, "--raw", "--max-new-tokens", 12)
    assert found["tokens"] == greedy(frontends.load(out), "a")
    assert found["prompt_tokens"] == len(frontends.tokenizer(frontends.load(out))(TEXT)["input_ids"])
    assert "'a' is folded into this folder's graph" in refused("run", folder, TEXT, "--task", "a")
    assert "no task 'b'; it has none" in refused("eval", folder, "--task", "b")
    assert ok("inspect", folder)["prompts"] == {"a": "in the graph, before every text"}
    shown = tpvc("export", out, "-o", tmp_path / "prefix", "--task", "a", "--form", "prefix", "--portable")
    assert shown.exit_code == 0 and "tpvc run" not in shown.stdout, "a portable graph alone is for other runtimes"
    assert (tmp_path / "prefix" / "portable" / "model.onnx").is_file()
    assert "holds a portable graph alone" in refused("run", tmp_path / "prefix", "x")
    told = ok("inspect", tmp_path / "prefix")
    assert told["provenance"]["folded"]["form"] == "prefix" and "portable/model.onnx" in told["files"]
    assert not (tmp_path / "prefix" / "model.onnx").exists()


def test_exported_beside_integers_that_knew_none(artefact, prompts, ok, tmp_path):
    folder = tmp_path / "onnx"
    ok("export", artefact, "-o", folder, "--accuracy-level", 0, "--prompt", f"x={prompts[1]}", "--task", "x")
    program = frontends.load(artefact)
    folded = FoldPrompt(frontends.read_prompts(program, {"x": prompts[1]})[0], "kv")(program)
    told = ok("run", folder, TEXT, "--raw", "--max-new-tokens", 12)
    assert told["tokens"] == greedy(folded, None)


def test_what_is_refused(carried, refused, tiny_llama, prompts, artefact, tmp_path):
    a, out = prompts[0], tmp_path / "out"
    quantize = ("quantize", tiny_llama, "-o", out, *ROUND)
    assert "found 'x' twice" in refused(*quantize, "--prompt", f"x={a}", "--prompt", f"x={prompts[1]}")
    assert "behind a prompt of 6" in refused(*quantize, "--seqlen", 11, "--prompt", f"x={a}")
    assert "do not go round" in refused(*quantize, "--nsamples", 1, "--prompt", f"x={a}")
    assert "quantise its base" in refused("quantize", carried[0], "-o", out)
    assert "already carries soft prompts (a, b)" in refused("export", carried[0], "-o", out, "--prompt", f"x={a}")
    assert "no task 'c'" in refused("export", carried[0], "-o", out, "--task", "c")
    assert "fold it as kv" in refused("export", carried[0], "-o", out, "--task", "a", "--form", "prefix")
    assert "only onnx" in refused("export", carried[0], "-o", out, "--to", "vllm", "--task", "a")
    assert "without a prompt to fold" in refused("export", carried[0], "-o", out, "--form", "prefix", "--portable")
    for nameless in (f"={a}", "x=", ""):
        assert f"found '{nameless}' (--prompt)" in refused(*quantize, "--prompt", nameless)
    other = json.loads((a / "tpvc.json").read_text())
    other["base"]["weights"] = "0" * 64
    (tmp_path / "other").mkdir()
    for file in a.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "tpvc.json").write_text(json.dumps(other))
    assert "tuned for another model" in refused("run", artefact, TEXT, "--task", tmp_path / "other")
    assert not out.exists()


@pytest.mark.parametrize("to", ["vllm", "gptq", "gptq_v2"])
def test_other_checkpoints_carry_them_too(to, carried, tiny_llama, prompts, ok, refused, tmp_path):
    """Quantised, or straight from the model: both share the fingerprint of the float weights."""
    out = tmp_path / to
    ok("export", carried[0], "--to", to, "-o", out)
    program = frontends.load(out)
    assert [p.name for p in program.prompts] == ["a", "b"]
    assert prompt_files.base_print(program) == prompt_files.base_print(frontends.load(tiny_llama))
    assert ok("verify", carried[0], out, "--no-logits")
    ok("quantize", tiny_llama, "-o", tmp_path / "plain", "--bits", 4, "--method", "rtn", "--group-size", 32)
    ok("export", tmp_path / "plain", "--to", to, "-o", tmp_path / "given", "--prompt", f"a={prompts[0]}")
    assert greedy(frontends.load(tmp_path / "given"), "a") == greedy(
        frontends.with_prompts(frontends.load(tmp_path / "plain"), {"a": prompts[0]}), "a"
    )
