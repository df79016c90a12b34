"""`tpvc run`: the same tokens from either runtime."""

import pytest

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, ok, write_adapter, tiny_llama):
    """An artefact with an adapter called "loud", and its folder for ONNX Runtime GenAI."""
    out = tmp_path_factory.mktemp("deployed")
    road = f"loud={write_adapter(tiny_llama, out / 'peft')}"
    ok("quantize", tiny_llama, "-o", out / "w4", "--method", "rtn", "--group-size", 32, "--road", road)
    ok("export", out / "w4", "-o", out / "onnx", "--accuracy-level", 0)
    return out / "w4", out / "onnx"


def test_both_runtimes_give_the_same_tokens(ok, artefact, exported):
    options = [PROMPT, "--max-new-tokens", 24, "--threads", 1]
    reference, runtime = ok("run", artefact, *options), ok("run", exported, *options)
    assert runtime["engine"] == "ONNX Runtime GenAI"
    assert reference["engine"] == "torch float32, dequantised"
    assert runtime["prompt_tokens"] == reference["prompt_tokens"]
    assert runtime["tokens"] == reference["tokens"]


def test_an_adapter_by_name(ok, refused, deployed):
    options = [PROMPT, "--max-new-tokens", 16, "--threads", 1]
    plain, reference = ok("run", deployed[0], *options), ok("run", deployed[0], *options, "--adapter", "loud")
    assert ok("run", deployed[1], *options)["tokens"] == plain["tokens"] != reference["tokens"]
    assert ok("run", deployed[1], *options, "--adapter", "loud")["tokens"] == reference["tokens"]
    for target in deployed:
        assert refused("run", target, *options, "--adapter", "calm") == "the model has no adapter 'calm'; it has loud"
        assert refused("run", target, *options, "--adapter", "") == "the model has no adapter ''; it has loud"


def test_streams_what_json_tells(tpvc, ok, exported):
    options = ["run", exported, PROMPT, "--max-new-tokens", 12, "--raw"]
    result = tpvc(*options)
    assert result.exit_code == 0
    assert result.stdout.encode() == (ok(*options)["text"] + "\n").encode()


def test_the_template_is_applied_unless_raw(ok, exported):
    told = ok("run", exported, PROMPT, "--max-new-tokens", 1)["prompt_tokens"]
    raw = ok("run", exported, PROMPT, "--max-new-tokens", 1, "--raw")["prompt_tokens"]
    assert told > raw


def test_a_seed_repeats_a_draw(ok, artefact, exported):
    for target in (artefact, exported):
        options = ["run", target, PROMPT, "--max-new-tokens", 16, "--temperature", 1.5]
        same, again, other = (ok(*options, "--seed", seed)["tokens"] for seed in (1, 1, 2))
        assert same == again
        assert same != other


def test_prompt_from_standard_input(ok, exported):
    piped = ok("run", exported, "--max-new-tokens", 4, input=PROMPT + "\n")
    assert piped["tokens"] == ok("run", exported, PROMPT, "--max-new-tokens", 4)["tokens"]


def test_chat_keeps_what_was_said(tpvc, exported, monkeypatch):
    from tpvc.compiler.cli import console

    monkeypatch.setattr(console, "interactive", lambda: True)
    result = tpvc("run", exported, "--max-new-tokens", 4, input="Hello\n\nAnd again\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("> ") == 4  # two questions, an empty line, the end


def test_a_chat_outlives_its_context(tpvc, exported, monkeypatch):
    """The oldest turns are forgotten; what is too long by itself, or no text, is a sentence and no end."""
    from tpvc.compiler.cli import console

    monkeypatch.setattr(console, "interactive", lambda: True)
    damaged = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    lines, asked = [*[PROMPT * 8] * 8, PROMPT * 200, damaged, "a\udcff", "Hello", EOFError()], []

    def typed(_):  # what a terminal gives: its lines are decoded one by one
        asked.append(lines[len(asked)])
        if isinstance(asked[-1], Exception):
            raise asked[-1]
        return asked[-1]

    monkeypatch.setattr("builtins.input", typed)
    result = tpvc("run", exported, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.stderr
    assert len(asked) == len(lines)
    sentences = [line for line in result.stderr.splitlines() if line.startswith("tpvc: ")]
    assert [("shorten the prompt" in s, "not UTF-8" in s) for s in sentences] == [(True, False), *[(False, True)] * 2]


def test_stops_at_the_end_of_the_context(ok, exported):
    found = ok("run", exported, PROMPT, "--raw", "--max-new-tokens", 100000)
    assert found["prompt_tokens"] + found["new_tokens"] <= 256


def test_bad_input(refused, artefact, exported, tmp_path):
    assert "no prompt" in refused("run", exported, input="")
    assert "nowhere" in refused("run", tmp_path / "nowhere", PROMPT)
    assert "context" in refused("run", exported, PROMPT * 200)
    assert "standard input is not UTF-8 at byte 1" in refused("run", exported, input=b"a\xff")
    for target in (artefact, exported):
        assert "prompt is not UTF-8" in refused("run", target, "a\udcff")
    for temperature in ("nan", "1e-38"):
        assert "--temperature" in refused("run", exported, PROMPT, "--temperature", temperature)
    for option in ("adapter", "task"):
        assert "is no name, and the exported folder" in refused("run", exported, PROMPT, f"--{option}", "./mine")
    assert "--seed" in refused("run", exported, PROMPT, "--seed", 2**40)
    for damaged in ("{}", "[]", "{", '{"model": {}}'):
        (tmp_path / "genai_config.json").write_text(damaged)
        assert "genai_config.json" in refused("run", tmp_path, PROMPT)


def test_model_without_a_template(refused, tiny_llama, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").unlink()
    assert "--raw" in refused("run", model, PROMPT)
