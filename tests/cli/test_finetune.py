"""A model and a domain in, the model out with what it knew: every method and space, stopped, refused, merged."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tpvc.compiler import finetune_pipeline as module
from tpvc.compiler import frontends, interpret
from tpvc.compiler.tuning import phase

FAST = ("--nsamples", 40, "--max-length", 16, "--batch-size", 4, "--lr", 2e-3, "--steps", 20)
IDS = torch.arange(5, 21)[None]


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """(general, domain): two texts."""
    folder = tmp_path_factory.mktemp("texts")
    general, domain = folder / "general.txt", folder / "domain.txt"
    general.write_text(" ".join(f"The dog number {i} sleeps on, and the fox jumps over it." for i in range(120)))
    domain.write_text(" ".join(f"def area{i}(width, height): return width * {i}" for i in range(80)))
    return general, domain


@pytest.fixture(scope="session")
def given(tiny_llama, texts):
    return ("finetune", tiny_llama, "--data", texts[1], "--general", texts[0], *FAST)


@pytest.fixture(scope="session")
def recorded(ok, tiny_llama, texts, tmp_path_factory):
    """{train: importance file}, at the default rate as `finetune --general` records it."""
    folder, files = tmp_path_factory.mktemp("recorded"), {}
    for train in ("weights", "lora"):
        files[train] = folder / train
        ok("importance", tiny_llama, "--data", texts[0], "-o", files[train], "--train", train, *FAST[:-4])
    return files


def logits_of(model, program=None):
    with torch.no_grad():
        return interpret.logits(program or frontends.load(model), IDS)


@pytest.mark.parametrize(("train", "lr"), [("weights", 2e-3), ("lora", 2e-3), ("road_2", 0.3)])
def test_the_domain_is_learned_and_a_report_written(ok, given, tmp_path, train, lr):
    out = tmp_path / "o"
    told = ok(*given, "-o", out, "--train", train, "--ratio", 0.1, "--lr", lr)["manifest"]
    kept = next(c for c in told["checks"] if c[0] == told["kept_step"])
    assert kept[1] < told["before"][0] - 0.05 and told["kept_step"] > 0
    assert told["phi"] > 0 and 0.01 < told["ratio"]["middle"] < 1
    assert len(told["drift"]) == len(told["coefficients"]) == 2 and all(v > 0 for _, v in told["drift"])
    assert told["importance"]["method"] == "path" and told["importance"]["steps"] == [9]
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 5 and "General perplexity" in html and "<script" not in html
    assert "exact answers" not in html  # which text has not
    assert not list(tmp_path.glob("*.partial"))


def test_full_weights_are_a_checkpoint_that_is_quantised(ok, given, tiny_llama, tmp_path):
    ok(*given, "-o", tmp_path / "o", "--train", "weights")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "o")(IDS).logits
    found = logits_of(tmp_path / "o")
    assert float((found - wanted).abs().max()) <= 30 * 128**0.5 * 2**-23 * float(wanted.abs().max())
    before, after = (load_file(d / "model.safetensors") for d in (tiny_llama, tmp_path / "o"))
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert same == {n for n in before if "proj" not in n}  # what is trained is the linears of the blocks
    ok("quantize", tmp_path / "o", "-o", tmp_path / "q", "--method", "rtn", "--group-size", 32)


def test_all_weights_are_trained_where_that_is_asked_for(ok, given, tiny_llama, tmp_path):
    ok(*given, "-o", tmp_path / "o", "--train", "weights", "--targets", "all")
    before, after = (load_file(d / "model.safetensors") for d in (tiny_llama, tmp_path / "o"))
    assert not any(torch.equal(before[n], after[n]) for n in before)


def test_lora_is_what_peft_loads_and_merged_it_computes_the_same(ok, given, tiny_llama, tmp_path):
    told = ok(*given, "-o", tmp_path / "o", "--train", "lora", "--rank", 4, "--merge")["manifest"]
    ok(*given, "-o", tmp_path / "plain", "--train", "lora", "--rank", 4)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "o" / "adapter" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        before = base(IDS).logits.clone()
        wanted = peft.PeftModel.from_pretrained(base, tmp_path / "plain")(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "o")(IDS).logits
    slack = 30 * 128**0.5 * 2**-23 * float(wanted.abs().max())
    assert float((merged - wanted).abs().max()) <= slack
    assert float((logits_of(tmp_path / "o") - wanted).abs().max()) <= slack < float((before - wanted).abs().max()) / 100
    assert told["artefact"] == "checkpoint" and told["options"]["rank"] == 4


def test_road_is_what_road_tune_writes(ok, given, tiny_llama, tmp_path):
    ok(*given, "-o", tmp_path / "o", "--train", "road_1", "--merge")
    ok(*given, "-o", tmp_path / "task", "--train", "road_1")
    assert {p.name for p in (tmp_path / "task").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tpvc.json",
        "report.html",
    }
    ok("road", "merge", tiny_llama, "--road", tmp_path / "task", "-o", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (
        tmp_path / "o" / "model.safetensors"
    ).read_bytes()


def test_integers_are_a_base_for_adapters(ok, refused, artefact, given, tmp_path):
    told = ok("finetune", artefact, *given[2:], "-o", tmp_path / "o", "--train", "lora")["manifest"]
    assert told["checks"][-1][1] < told["checks"][0][1]
    said = refused("finetune", artefact, *given[2:], "-o", tmp_path / "m", "--train", "lora", "--merge")
    assert "no adapter can be merged" in said


@pytest.mark.parametrize("train", ["weights", "lora"])
def test_a_recorded_importance_gives_what_recording_it_now_gives(
    ok, given, tiny_llama, texts, recorded, tmp_path, train
):
    ok(*given, "-o", tmp_path / "now", "--train", train, "--phi", 0.3)
    rest = [x for x in given if x not in ("--general", texts[0])]
    ok(*rest, "-o", tmp_path / "then", "--importance", recorded[train], "--phi", 0.3)
    file = "model.safetensors" if train == "weights" else "adapter_model.safetensors"
    assert (tmp_path / "now" / file).read_bytes() == (tmp_path / "then" / file).read_bytes()


def test_every_method_and_ablation_is_one_option(ok, given, tmp_path):
    """All different, but for what is anchored at the same place: no step of plain fine-tuning has a penalty."""
    options = {
        "ours": (),
        "no layers": ("--without", "layers"),
        "no elements": ("--without", "elements"),
        "neither": ("--without", "layers", "--without", "elements"),
        "ewc": ("--method", "ewc"),
        "l2": ("--method", "l2"),
        "plain": ("--method", "plain"),
    }
    told, found = {}, {}
    for name, chosen in options.items():
        phi = () if name == "plain" else ("--phi", 20)
        told[name] = ok(*given, "-o", tmp_path / name, "--train", "lora", *chosen, *phi)["manifest"]
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    names = list(options)
    assert {n: t["coefficients"] is not None for n, t in told.items()} == {
        n: n in ("ours", "no elements") for n in names
    }
    for i, a in enumerate(names):
        for b in names[:i]:
            assert any(not torch.equal(found[a][k], found[b][k]) for k in found[a]), (a, b)
    assert all(point[2] == 0 for point in told["plain"]["curve"])
    assert all(told[n]["curve"][-1][2] > 0 for n in names if n != "plain")
    drift = {n: sum(v for _, v in told[n]["drift"]) for n in names}
    assert drift["l2"] < drift["plain"] and drift["ewc"] < drift["plain"]


def test_without_both_parts_it_is_the_distance_to_the_anchor(ok, given, tiny_llama, recorded, tmp_path):
    """phi R = phi sum (theta - theta*)^2 of the last step, against the file's anchor; steps of warm-up are left out."""
    rest = [*given[:4], *FAST[:-1], 1]
    options = ("--without", "layers", "--without", "elements", "--phi", 1, "--importance", recorded["weights"])
    told = ok(*rest, *options, "-o", tmp_path / "o")["manifest"]
    assert told["curve"][0][2] == 0  # the only step began at theta*


@pytest.mark.parametrize("train", ["weights", "lora"])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(ok, tpvc, given, tmp_path, monkeypatch, train):
    command = (*given, "--train", train, "--micro-batch", 3)
    ok(*command, "-o", tmp_path / "once")
    monkeypatch.setattr(phase, "record", _stopping(phase.record, {6}))
    assert tpvc(*command, "-o", tmp_path / "twice").exit_code == 130  # in the general phase
    monkeypatch.undo()
    monkeypatch.setattr(phase.Strength, "learn", _stopping(phase.Strength.learn, {7, 16}))
    for _ in range(2):  # in the domain, while phi is sought and after that
        assert tpvc(*command, "-o", tmp_path / "twice").exit_code == 130
        assert not (tmp_path / "twice").exists()
    monkeypatch.undo()
    ok(*command, "-o", tmp_path / "twice")
    names = {p.name for p in (tmp_path / "once").iterdir()} - {"report.html"}
    assert names == {p.name for p in (tmp_path / "twice").iterdir()} - {"report.html"}
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name
    assert not list(tmp_path.glob("*.partial"))


def _stopping(whole, at):
    calls = 0

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls in at:
            raise KeyboardInterrupt
        return whole(*arguments)

    return stop


def test_another_run_does_not_go_on_with_it(tpvc, refused, ok, given, tmp_path, monkeypatch):
    monkeypatch.setattr(phase.Strength, "learn", _stopping(phase.Strength.learn, {7}))
    assert tpvc(*given, "-o", tmp_path / "o").exit_code == 130
    monkeypatch.undo()
    assert "phi is null, not 0.5" in refused(*given, "-o", tmp_path / "o", "--phi", 0.5)
    ok(*given, "-o", tmp_path / "o", "--phi", 0.5, "--overwrite")


def test_a_loss_that_is_no_number_leaves_the_last_good_state(refused, given, tmp_path, monkeypatch):
    whole, calls = module.backward_of, 0

    def breaking(*arguments):
        compute = whole(*arguments)

        def backward(see, indices):
            nonlocal calls
            calls += 1
            return float("nan") if calls == 13 else compute(see, indices)

        return backward

    monkeypatch.setattr(module, "backward_of", breaking)  # of the domain alone
    said = refused(*given, "-o", tmp_path / "o", "--train", "lora")
    told = json.loads((tmp_path / "o" / "tpvc.json").read_text())
    assert told["stopped"] == {"step": 12} and 0 < told["kept_step"] <= 12 and told["checks"][-1][0] == 12
    assert "at step 12" in said and f"holds the state of step {told['kept_step']}" in said
    assert "no finite number at step 12" in (tmp_path / "o" / "report.html").read_text()
    peft.PeftConfig.from_pretrained(tmp_path / "o")
    calls = 12  # at once: there is no good state
    said = refused(*given, "-o", tmp_path / "p", "--train", "lora")
    assert "the loss is nan at step 0" in said and not (tmp_path / "p").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_examples_are_learned_by_their_answers(ok, tiny_llama, texts, tmp_path):
    path = tmp_path / "d.jsonl"
    records = [{"prompt": f"{('day', 'fox')[i % 2]} {i}?", "completion": (" no", " yes")[i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    rest = ("--steps", 40, "--batch-size", 4, "--lr", 1e-2, "--nsamples", 40, "--max-length", 16)
    told = ok("finetune", tiny_llama, "--data", path, "--general", texts[0], "-o", tmp_path / "o", *rest)["manifest"]
    assert told["data"]["training"] == 36 and told["checks"][-1][1] < told["checks"][0][1] - 0.2
    assert "exact answers" in (tmp_path / "o" / "report.html").read_text()


def test_what_was_learned_is_told(tpvc, given, recorded, texts, tmp_path):
    """In a line, and in the report, with the importance file that was used."""
    rest = [x for x in given if x not in ("--general", texts[0])]
    said = tpvc(*rest, "-o", tmp_path / "o", "--importance", recorded["lora"]).stdout
    told = json.loads((tmp_path / "o" / "tpvc.json").read_text())
    html = (tmp_path / "o" / "report.html").read_text()
    learned, kept = told["data"]["training"], told["data"]["validation"]
    assert f"learned     {learned} windows of 16 tokens, {kept} to choose by" in said
    assert f"{learned} windows of text, {kept} to choose by" in html
    assert told["importance"]["file"]["sha256"] in html


def test_bfloat16_learns_too(ok, given, tmp_path):
    told = ok(*given, "-o", tmp_path / "o", "--train", "weights", "--dtype", "bfloat16")["manifest"]
    assert told["checks"][-1][1] < told["before"][0] - 0.05 and told["options"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--phi", "-0.1"), "phi is -0.1; expected a number of at least 0"),
        (("--ratio", "-1"), "the ratio of penalty to loss is -1"),
        (("--phi", "1", "--ratio", "0.1"), "expected one of them"),
        (("--method", "plain", "--phi", "1"), "plain fine-tuning has no penalty"),
        (("--method", "l2", "--without", "layers"), "of the hierarchical method"),
        (("--targets", ","), "no linear called none"),
        (("--nsamples", "4000"), "use a longer text"),
        (("--max-length", "250", "--nsamples", "10"), "--validation file"),
        (("--train", "weights", "--rank", "4"), "a rank of 4 was asked for"),
        (("--steps", "1"), "a run of 1 step ends before its penalty sets in"),
        (("--train", "weights", "--merge"), "there is nothing to merge"),
        (("--importance", "nowhere"), "there is no file nowhere"),
        (("--validation", "nowhere.txt"), "nowhere.txt"),
        (("--lr", "1e30", "--phi", "0"), "lower the learning rate"),
        (("--device", "cuda:9"), "cannot be used here"),
    ],
)
def test_bad_wishes_are_one_sentence(refused, given, tmp_path, options, words):
    assert words in refused(*given, "-o", tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


def test_importance_that_does_not_belong(refused, given, tiny_llama, texts, recorded, artefact, tmp_path):
    rest, file = [x for x in given if x not in ("--general", texts[0])], recorded["lora"]
    out = ("-o", tmp_path / "o")
    assert "name one of them" in refused(*rest, *out)
    assert "leave it out" in refused(*rest, *out, "--importance", file, "--train", "weights")
    assert "targets is q_proj, but" in refused(*rest, *out, "--importance", file, "--targets", "q_proj")
    assert "rank is 4" in refused(*rest, *out, "--importance", file, "--rank", 4)
    of_weights = (*rest, *out, "--importance", recorded["weights"])
    assert "a rank of 8 was asked for, which training 'weights' has not" in refused(*of_weights, "--rank", 8)
    assert "needs 'fisher'" in refused(*rest, *out, "--importance", file, "--method", "ewc")
    assert "uses no importance" in refused(*rest, *out, "--importance", file, "--method", "l2")
    other = tmp_path / "other"
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_llama)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(other)
    frontends.tokenizer(frontends.load(tiny_llama)).save_pretrained(other)
    assert "made of another model" in refused("finetune", other, *rest[2:], *out, "--importance", file)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["importance", "anchor"])
@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: None], ids=["shorter", "away"])
def test_importance_whose_tensors_were_changed(refused, given, texts, recorded, tmp_path, kind, change):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    rest, file = [x for x in given if x not in ("--general", texts[0])], tmp_path / "changed.importance"
    with safe_open(recorded["lora"], framework="pt") as held:
        told = held.metadata()
    tensors = load_file(recorded["lora"])
    name = next(n for n in tensors if n.startswith(f"{kind}."))
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed.clone()}), file, told)
    said = refused(*rest, "-o", tmp_path / "o", "--importance", file)
    assert "does not have the tensors" in said or "is damaged" in said
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_an_importance_file_serves_the_quantised_form_of_its_model(ok, given, texts, recorded, artefact, tmp_path):
    rest = [x for x in given if x not in ("--general", texts[0])]
    ok("finetune", artefact, *rest[2:], "-o", tmp_path / "o", "--importance", recorded["lora"])
