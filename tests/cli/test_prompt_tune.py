"""Examples in, a soft prompt and its start out: through the command line, resumed, on float and on integers."""

import json

import pytest
import torch

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import prompt_files, prompt_start
from tpvc.compiler.program import dense, prompt_ids
from tpvc.compiler.tuning import data as data_module
from tpvc.compiler.tuning import prompt_tune as module
from tpvc.compiler.tuning.loss import score_answers
from tpvc.passes.bank_prompt import BankPrompt

WORDS = {"0": "no", "1": "yes"}
ASKED = ("--template", "{text}?", "--label", "0=no", "--label", "1=yes", "--lr", 0.3, "--batch-size", 4)
FAST = ("--steps", 20, "--virtual-tokens", 6, *ASKED)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Questions whose answer depends on the first word."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    records = [{"text": f"{('day', 'fox')[i % 2]} {i}", "label": i % 2} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def tuned(ok, tiny_llama, data, tmp_path_factory):
    """A tuned prompt and what was told of it."""
    out = tmp_path_factory.mktemp("prompts") / "yes-no"
    return out, ok("prompt", "tune", tiny_llama, "--data", data, "-o", out, *FAST)["manifest"]


def test_a_prompt_is_learned_written_and_read_again(tuned, tiny_llama, data):
    out, told = tuned
    weights = ("adapter_model.safetensors", "start.safetensors")
    assert {p.name for p in out.iterdir()} == {"adapter_config.json", *weights, "tpvc.json", "report.html"}
    assert told["checks"][-1][1] < told["checks"][0][1] - 0.1
    program = frontends.load(tiny_llama)
    tokenizer = frontends.tokenizer(program)
    prompt = prompt_files.read(out, "x")
    ids = torch.tensor(told["start"]["ids"])
    table = dense(program.params["model.embed_tokens.weight"])
    assert len(set(ids.tolist())) == 6 and torch.equal(prompt.start, table[ids])
    assert prompt.base == prompt_files.base_print(program)
    assert prompt.tokenizer == prompt_files.tokenizer_print(tokenizer)
    # what was measured while tuning is what the written prompt does
    banked = BankPrompt((prompt,))(program)
    words = {"template": "{text}?", "labels": WORDS}
    checking = data_module.read_data(program, tokenizer, data, None, 250, 0, **words).checking
    found = score_answers(
        banked, interpret.in_memory(banked), module.behind(prompt_ids(banked, "x"), checking), batch_size=8
    )
    kept = next(c for c in told["checks"] if c[0] == told["kept_step"])
    # products were in bfloat16 while tuning: 15 of them, each off by 2^-9 of its size
    assert found.loss == pytest.approx(kept[1], abs=15 * 2**-9)
    html = (out / "report.html").read_text()
    assert "<svg" in html and "soft prompt for" in html and "<script" not in html


def test_how_the_path_of_a_start_was_typed_leaves_no_trace(ok, tuned, tiny_llama, data, tmp_path, monkeypatch):
    start, asked = tuned[0], ("--data", data, "--steps", 1, *ASKED)
    monkeypatch.chdir(start.parent)
    for out, typed in (("a", start), ("b", start.name)):
        ok("prompt", "tune", tiny_llama, "-o", tmp_path / out / "more", "--init", f"prompt:{typed}", *asked)
    a, b = (tmp_path / out / "more" for out in "ab")
    assert (a / "tpvc.json").read_bytes() == (b / "tpvc.json").read_bytes()


def test_peft_gives_the_loss_that_was_told(tuned, tiny_llama, data):
    import peft
    import transformers

    out, told = tuned
    program = frontends.load(tiny_llama)
    words = {"template": "{text}?", "labels": WORDS}
    checking = data_module.read_data(program, frontends.tokenizer(program), data, None, 250, 0, **words).checking
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), out).eval()
    total, tokens = 0.0, 0
    for example in checking:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.answer] = -100
        count = len(example.ids) - example.answer
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    kept = next(c for c in told["checks"] if c[0] == told["kept_step"])
    assert total / tokens == pytest.approx(kept[1], abs=15 * 2**-9)


def test_the_same_command_gives_the_same_bytes_and_a_stopped_run_too(
    tuned, ok, tpvc, tiny_llama, data, tmp_path, monkeypatch
):
    calls, whole = 0, module.answer_logits

    def stopping(*given):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(module, "answer_logits", stopping)
    twice = tmp_path / "yes-no"
    given = ("prompt", "tune", tiny_llama, "--data", data, "-o", twice, *FAST)
    assert tpvc(*given).exit_code == 130
    assert not twice.exists() and (tmp_path / "yes-no.partial").exists()
    ok(*given)
    assert calls == 12 + 20 - 10  # ten steps, five stretches of two, were not repeated
    for name in ("adapter_config.json", "adapter_model.safetensors", "start.safetensors", "tpvc.json"):
        assert (tuned[0] / name).read_bytes() == (twice / name).read_bytes()


def test_only_the_prompt_moves_and_integers_are_a_base_too(ok, artefact, data, tmp_path):
    before = (artefact / "model.safetensors").read_bytes()
    told = ok("prompt", "tune", artefact, "--data", data, "-o", tmp_path / "p", *FAST)["manifest"]
    assert told["checks"][-1][1] < told["checks"][0][1] - 0.1
    assert (artefact / "model.safetensors").read_bytes() == before


def test_a_prompt_of_the_float_model_goes_on_upon_its_integers(tuned, ok, artefact, data, tmp_path):
    """The vector is measured from the same start as before."""
    out = tmp_path / "adapted"
    told = ok(
        "prompt", "tune", artefact, "--data", data, "-o", out, "--init", f"prompt:{tuned[0]}", "--steps", 4, *ASKED
    )["manifest"]
    first, second = prompt_files.read(tuned[0], "x"), prompt_files.read(out, "x")
    assert torch.equal(first.start, second.start) and not torch.equal(first.values, second.values)
    assert first.base == second.base and first.tokenizer == second.tokenizer
    assert told["checks"][0][1] < tuned[1]["checks"][0][1] - 0.1


@pytest.mark.parametrize("init", ["normal", "text:the dog sleeps"])
def test_other_starts(ok, tiny_llama, data, tmp_path, init):
    given = ("--steps", 1, "--virtual-tokens", 9, "--init", init, "--seed", 3, *ASKED)
    told = ok("prompt", "tune", tiny_llama, "--data", data, "-o", tmp_path / "p", *given)["manifest"]
    program = frontends.load(tiny_llama)
    start = prompt_files.read(tmp_path / "p", "x").start
    table = dense(program.params["model.embed_tokens.weight"])
    if init == "normal":
        assert told["start"]["deviation"] == pytest.approx(float(table.std()), rel=1e-6)
        # 576 numbers: their deviation is within 4 / sqrt(2 * 576) of it
        assert float(start.std()) == pytest.approx(float(table.std()), rel=0.12)
    else:
        ids = told["start"]["ids"]
        assert torch.equal(start, table[ids]) and ids[: len(ids) // 2] != ids[len(ids) // 2 :]
        words = frontends.tokenizer(program)("the dog sleeps")["input_ids"]
        assert ids == (words * 9)[:9]


def test_a_prompt_to_start_from_is_of_this_model_and_tokenizer(refused, tuned, tiny_llama, data, tmp_path):
    import shutil

    for name, edit in (
        ("model", lambda told: told["base"].update(weights="f" * 64)),
        ("tokenizer", lambda told: told.update(tokenizer="f" * 64)),
    ):
        shutil.copytree(tuned[0], tmp_path / name)
        told = json.loads((tmp_path / name / "tpvc.json").read_text())
        edit(told)
        (tmp_path / name / "tpvc.json").write_text(json.dumps(told))
        given = ("--init", f"prompt:{tmp_path / name}", "-o", tmp_path / "out")
        said = refused("prompt", "tune", tiny_llama, "--data", data, *given)
        assert f"was tuned for another {name} (ffffffffffff, " in said and not (tmp_path / "out").exists()


def test_gemma_starts_behind_its_factor(tmp_path, tiny_tokenizer):
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma2Config(vocab_size=384, num_key_value_heads=1, head_dim=16, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    program = frontends.load(tmp_path)
    made, _ = prompt_start.start(program, tiny_tokenizer, "text:the", 2, 0)
    ids = tiny_tokenizer("the")["input_ids"] * 2
    assert torch.equal(made.values, dense(program.params["model.embed_tokens.weight"])[ids[:2]] * 32**0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--init", "zeros"), "start of the prompt is 'zeros'; expected vocab, normal"),
        (("--init", "text:"), "expected vocab"),
        (("--init", "prompt:nowhere"), "'nowhere' is not a directory"),
        (("--virtual-tokens", "385"), "expected at most 384"),
        (("--virtual-tokens", "260"), "no room for text in a context of 256"),
        (("--virtual-tokens", "255"), "do not fit into 1"),
        (("--lr", "0"), "expected a rate above 0"),
        (("--lr", "1e30", "--steps", "20"), "lower the"),
        (("--lr", "1e38", "--steps", "20"), "expected a rate above 0, below 1e+37"),
        (("--validation", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--device", "cuda:9"), "cannot be used here"),
    ],
)
def test_bad_wishes_are_one_sentence(refused, tiny_llama, data, tmp_path, options, words):
    assert words in refused("prompt", "tune", tiny_llama, "--data", data, "-o", tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())
