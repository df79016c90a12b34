"""Examples in, an adapter in PEFT's format out: through the command line, resumed, on float and on integers."""

import json

import pytest
import torch

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import road_files
from tpvc.compiler.tuning import data as data_module
from tpvc.compiler.tuning import road_tune as module
from tpvc.compiler.tuning.loss import score_answers
from tpvc.passes.bank_road import BankRoad

WORDS = {"0": "no", "1": "yes"}
FAST = ("--steps", 20, "--batch-size", 4, "--lr", 0.05, "--template", "{text}?", "--label", "0=no", "--label", "1=yes")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two dozen questions whose answer depends on the first word."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    records = [{"text": f"{('day', 'fox')[i % 2]} {i}", "label": i % 2} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_an_adapter_is_learned_written_and_read_again(ok, tiny_llama, data, tmp_path):
    out = tmp_path / "yes-no"
    told = ok("road", "tune", tiny_llama, "--data", data, "-o", out, *FAST)["manifest"]
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tpvc.json",
        "report.html",
    }
    assert told["checks"][-1][1] < told["checks"][0][1] - 0.2
    assert told["data"]["training"] == 36 and told["data"]["validation"] == 4
    program = frontends.load(tiny_llama)
    banked = BankRoad((road_files.read(out, program, "x"),))(program)
    # what was measured while tuning is what the written adapter does
    examples = data_module.encode_examples(
        frontends.tokenizer(program),
        data_module.read_examples(data, template="{text}?", labels=WORDS),
        256,
        1,
    )
    held_out = data_module.held_out(examples, 0, "data")[1]
    found = score_answers(banked, interpret.in_memory(banked), held_out, 8, 0)
    kept = next(c for c in told["checks"] if c[0] == told["kept_step"])
    # products were in bfloat16 while tuning: 15 of them, each off by 2^-9 of its size
    assert found.loss == pytest.approx(kept[1], abs=15 * 2**-9)
    html = (out / "report.html").read_text()
    assert "<svg" in html and "Validation loss" in html and "<script" not in html


def test_the_same_command_gives_the_same_bytes_and_a_stopped_run_too(ok, tpvc, tiny_llama, data, tmp_path, monkeypatch):
    once = tmp_path / "a"
    ok("road", "tune", tiny_llama, "--data", data, "-o", once, *FAST)
    calls = 0
    whole = module.road.loss_of

    def stopping(*given):
        compute = whole(*given)

        def loss(indices):
            nonlocal calls
            calls += 1
            if calls == 12:
                raise KeyboardInterrupt
            return compute(indices)

        return loss

    monkeypatch.setattr(module.road, "loss_of", stopping)
    twice = tmp_path / "b"
    result = tpvc("road", "tune", tiny_llama, "--data", data, "-o", twice, *FAST)
    assert result.exit_code == 130 and not twice.exists() and (tmp_path / "b.partial").exists()
    ok("road", "tune", tiny_llama, "--data", data, "-o", twice, *FAST)
    assert calls == 12 + 20 - 10  # ten steps, five stretches of two, were not repeated
    for name in ("adapter_config.json", "adapter_model.safetensors", "tpvc.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()


def test_another_run_does_not_go_on_with_it(tpvc, refused, tiny_llama, data, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.road, "loss_of", lambda *_: stopped)
    out = tmp_path / "out"
    assert tpvc("road", "tune", tiny_llama, "--data", data, "-o", out, *FAST).exit_code == 130
    monkeypatch.undo()
    said = refused("road", "tune", tiny_llama, "--data", data, "-o", out, *FAST, "--seed", 5)
    assert "seed is 0, not 5" in said


def test_integers_are_a_base_too(ok, artefact, data, tmp_path):
    out = tmp_path / "on-integers"
    told = ok("road", "tune", artefact, "--data", data, "-o", out, *FAST)["manifest"]
    assert told["checks"][-1][1] < told["checks"][0][1] - 0.2


def test_csv_with_named_columns_and_halves(ok, tiny_llama, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("sentence,class\n" + "".join(f"day {i},{i % 2}\n" for i in range(20)))
    columns = ("--column", "text=sentence", "--column", "label=class", "--pairs", "second", "--variant", "road_2")
    told = ok("road", "tune", tiny_llama, "--data", path, "-o", tmp_path / "o", "--steps", 2, *columns)["manifest"]
    assert told["options"]["pairs"] == "second"
    program = frontends.load(tiny_llama)
    for rotation in road_files.read(tmp_path / "o", program, "x").rotations.values():
        first = torch.arange(rotation.features).view(-1, 2, rotation.group // 2)[: rotation.features // rotation.group]
        pairs = first[:, 0].reshape(-1)[: rotation.features // 4]
        assert not rotation.theta[pairs].any() and rotation.theta.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--variant", "1"), "'1' is not one of 'road_1', 'road_2', 'road_4'"),
        (("--group-size", "48"), "does not divide"),
        (("--targets", "query"), "no linear called 'query'"),
        (("--column", "label=klass"), "klass"),
        (("--column", "label"), "expected --column FIELD=COLUMN"),
        (("--lr", "0"), "expected a rate above 0"),
        (("--lr", "1e30", "--steps", "20"), "lower the"),
        (("--epochs", "nan"), "expected numbers above 0"),
        (("--targets", ","), "no targets were named"),
        (("--validation", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--template", "{title}"), "title"),
        (("--device", "cuda:9"), "cannot be used here"),
    ],
)
def test_bad_wishes_are_one_sentence(refused, tiny_llama, data, tmp_path, options, words):
    out = tmp_path / "out"
    assert words in refused("road", "tune", tiny_llama, "--data", data, "-o", out, *options)
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_never_replaced(refused, tiny_llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tpvc.json").write_text("{}")
    (out / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    said = refused("road", "tune", tiny_llama, "--data", out / "train.jsonl", "-o", out, "--overwrite")
    assert "would be lost" in said and (out / "train.jsonl").exists()


def test_changed_examples_are_another_run(tpvc, refused, tiny_llama, tmp_path, monkeypatch):
    """Also when training and validation files share a name."""

    def stopped(*_):
        raise KeyboardInterrupt

    paths = [tmp_path / part / "d.jsonl" for part in ("train", "dev")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"prompt": f"a {i}", "completion": "b"}) + "\n" for i in range(12)))
    given = ("road", "tune", tiny_llama, "--data", paths[0], "--validation", paths[1], "-o", tmp_path / "out")
    monkeypatch.setattr(module.road, "loss_of", lambda *_: stopped)
    assert tpvc(*given, "--steps", 4).exit_code == 130
    monkeypatch.undo()
    paths[0].write_text(paths[0].read_text().replace("a 3", "a 4"))
    assert "tokens is" in refused(*given, "--steps", 4)


def test_too_few_examples(refused, tiny_llama, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    said = refused("road", "tune", tiny_llama, "--data", path, "-o", tmp_path / "out")
    assert "1 examples" in said and "--validation" in said


def test_the_folder_of_an_adapter_runs_beside_any_model(ok, refused, tiny_llama, artefact, data, tmp_path):
    out = tmp_path / "yes-no"
    ok("road", "tune", artefact, "--data", data, "-o", out, *FAST)
    told = {}
    for name, adapter in (("base", ()), ("tuned", ("--adapter", out))):
        told[name] = ok("run", artefact, "fox 3?", "--raw", "--max-new-tokens", 4, *adapter)["tokens"]
    assert told["base"] != told["tuned"]
    exported = tmp_path / "onnx"
    ok("export", artefact, "-o", exported, "--accuracy-level", 0, "--road", f"task={out}")
    there = ok("run", exported, "fox 3?", "--raw", "--max-new-tokens", 4, "--adapter", "task")["tokens"]
    assert there == told["tuned"]
    assert ok("run", exported, "fox 3?", "--raw", "--max-new-tokens", 4)["tokens"] == told["base"]
    assert "no adapter 'other'; it has task" in refused("run", exported, "fox", "--raw", "--adapter", "other")
    assert ok("eval", artefact, "--adapter", out, "--windows", 2, "--seqlen", 16)["adapter"] == str(out)
