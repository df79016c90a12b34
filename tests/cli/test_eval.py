"""`tpvc eval`: the two runtimes agree on a text, and a model is no distance from itself."""

import math

import pytest
import torch

WINDOWS = ["--windows", 6, "--seqlen", 32]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Rivers run to the sea, and in 144 days the boat comes back. " * 30)
    return path


def test_perplexity_is_the_protocols(ok, tiny_llama, text):
    """Against transformers' own model: float32 sums over 64 to 384 terms, a mean of 186 losses, 1e-5 of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny_llama)(text.read_text(), add_special_tokens=False)["input_ids"]
    x = torch.tensor(ids[: 6 * 32]).view(6, 32)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_llama)(x).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).item()
    found = ok("eval", tiny_llama, "--text", text, *WINDOWS)
    assert math.isclose(found["perplexity"], math.exp(loss), rel_tol=1e-5)


def test_a_model_is_no_distance_from_itself(ok, tiny_llama, text):
    found = ok("eval", tiny_llama, "--against", tiny_llama, "--text", text, *WINDOWS)["against"]
    assert abs(found["kl"]) < 1e-6
    assert found["top1"] == 1


def test_runtime_and_interpreter_agree(ok, artefact, exported, tiny_llama, text):
    """Both in float32: logits differ by accumulated rounding, about 1e-6 of them, and with them KL and perplexity."""
    options = ["--against", tiny_llama, "--text", text, *WINDOWS]
    a, b = ok("eval", artefact, *options), ok("eval", exported, *options)
    assert math.isclose(a["perplexity"], b["perplexity"], rel_tol=1e-4)
    assert math.isclose(a["stderr"], b["stderr"], rel_tol=1e-3)
    assert math.isclose(a["against"]["kl"], b["against"]["kl"], rel_tol=1e-2, abs_tol=1e-6)
    assert a["against"]["perplexity"] == b["against"]["perplexity"]
    assert a["against"]["kl"] > 0


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, ok, write_adapter, tiny_llama):
    """An artefact with a random adapter called "loud"."""
    out = tmp_path_factory.mktemp("deployed")
    road = write_adapter(tiny_llama, out / "loud")
    ok("quantize", tiny_llama, "-o", out / "w4", "--method", "rtn", "--group-size", 32, "--road", road)
    return out / "w4"


def test_an_adapter_against_the_base(ok, tpvc, refused, deployed, text):
    options = ["--text", text, "--windows", 2, "--seqlen", 32]
    found = ok("eval", deployed, "--adapter", "loud", "--against", deployed, *options)
    assert found["adapter"] == "loud" and found["against"]["kl"] > 1e-3
    assert found["against"]["perplexity"] == ok("eval", deployed, *options)["perplexity"]
    assert "w4 with loud" in " ".join(tpvc("eval", deployed, "--adapter", "loud", *options).stdout.split())
    assert "it has loud" in refused("eval", deployed, "--adapter", "calm", *options)


def test_table_and_built_in_text(tpvc, artefact, tiny_llama):
    result = tpvc("eval", artefact, "--against", tiny_llama, "--windows", 2)
    assert result.exit_code == 0, result.stderr
    assert "2 windows of 128 tokens, built-in text" in result.stdout
    assert "100 %" in result.stdout


def test_one_window_has_no_error(ok, artefact, text):
    assert ok("eval", artefact, "--text", text, "--windows", 1, "--seqlen", 32)["stderr"] is None


def test_help_tells_how_slow_a_folder_is(tpvc):
    assert "token by token" in tpvc("eval", "--help").stdout


def test_bad_input(refused, artefact, text, tmp_path):
    assert "tokens" in refused("eval", artefact, "--text", text, "--windows", 1000, "--seqlen", 32)
    assert "context" in refused("eval", artefact, "--text", text, "--windows", 1, "--seqlen", 1000)
    assert "nothing.txt" in refused("eval", artefact, "--text", tmp_path / "nothing.txt")
    assert "nowhere" in refused("eval", tmp_path / "nowhere", "--text", text)
