"""General text in, a file that fine-tuning reuses out: through the command line, stopped and gone on with."""

import pytest
import torch

from tpvc.compiler import frontends
from tpvc.compiler.tuning import general_phase as module
from tpvc.compiler.tuning import importance_file, phase
from tpvc.compiler.tuning.space import make_space

FAST = ("--nsamples", 40, "--max-length", 16, "--batch-size", 4, "--lr", 1e-3)


@pytest.fixture(scope="session")
def general(tmp_path_factory):
    """Two texts of more than 40 windows of 16 tokens."""
    folder, made = tmp_path_factory.mktemp("general"), []
    for name, line in (
        ("dogs", "The dog number {} sleeps on, and the fox jumps over it."),
        ("code", "x{} = area(3, 4)"),
    ):
        made.append(folder / f"{name}.txt")
        made[-1].write_text(" ".join(line.format(i) for i in range(120)))
    return made


@pytest.mark.parametrize("train", ["weights", "lora", "road_1"])
def test_a_file_with_a_record_of_how_it_came_about(ok, tiny_llama, general, tmp_path, train):
    out = tmp_path / "a.importance"
    told = ok("importance", tiny_llama, "--data", general[0], "-o", out, "--train", train, *FAST)
    found = importance_file.read(out)
    about = told["manifest"]
    assert about["method"] == "path" and about["steps"] == [9] and about["train"] == train
    assert about["loss_after"] < about["loss_before"] and about["omega_sum"] > 0
    assert told["bytes"] == out.stat().st_size and told["importance_bytes"] == about["protected"]
    assert about["data"][0]["files"].keys() == {"dogs.txt"} and len(about["base"]) == 64
    total = sum(float(c.dense.double().sum()) for c in found.omega.values())
    assert total / about["protected"] == pytest.approx(1, abs=0.01)  # mean 1 but for rounding to codes
    assert float(found.alpha.mean()) == pytest.approx(1, abs=1e-6) and len(found.alpha) == 2
    assert all(t.isfinite().all() for t in found.anchor.values())
    assert not list(tmp_path.glob("*.partial"))


def test_several_texts_add_up(ok, tiny_llama, general, tmp_path, monkeypatch):
    """Omega of two texts is the sum of the Omega of each, the second begun where the first ended."""
    parts, whole = [], module.importance

    def kept(*given):
        parts.append(whole(*given)[0])
        return whole(*given)

    monkeypatch.setattr(module, "importance", kept)
    both = ("--data", general[0], "--data", general[1])
    told = ok("importance", tiny_llama, *both, "-o", tmp_path / "two", "--train", "lora", *FAST)["manifest"]
    found = importance_file.read(tmp_path / "two")
    assert len(told["data"]) == 2 and told["steps"] == [9, 9] and len(parts) == 2 * len(found.omega)
    names = make_space(frontends.load(tiny_llama), "lora", "all-linear", 8, 0).layers
    for name, first, second in zip(names, parts, parts[len(names) :], strict=False):
        coded = found.omega[name]
        wanted = (first + second) / told["scale"]
        large = wanted > wanted.max() * 2**-31
        ratio = coded.dense[large] / wanted[large]
        assert float(ratio.log2().abs().max()) <= 1 / 16 + 2**-20, name
        assert first.any() and second.any() and not torch.equal(first, second)


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(ok, tpvc, tiny_llama, general, tmp_path, monkeypatch):
    given = ("importance", tiny_llama, "--data", general[0], "--data", general[1], "--train", "weights", *FAST)
    ok(*given, "-o", tmp_path / "once")
    calls, whole = 0, phase.record

    def stopping(*arguments):
        nonlocal calls
        calls += 1
        if calls in (5, 9):  # in the first text, and, gone on with, in the second
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(phase, "record", stopping)
    for _ in range(2):
        assert tpvc(*given, "-o", tmp_path / "twice").exit_code == 130
        assert (tmp_path / "twice.partial").exists() and not (tmp_path / "twice").exists()
    monkeypatch.undo()
    ok(*given, "-o", tmp_path / "twice")
    assert (tmp_path / "once").read_bytes() == (tmp_path / "twice").read_bytes()
    assert not (tmp_path / "twice.partial").exists()


def test_a_second_text_does_not_go_on_behind_another_first_one(ok, tpvc, tiny_llama, general, tmp_path, monkeypatch):
    """Stopped in the second of two texts, and begun with another first one: not from what the old first one left."""
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"{i} foxes and {i} dogs jump." for i in range(160)))
    given = ("importance", tiny_llama, "--train", "lora", *FAST)
    ok(*given, "--data", other, "--data", general[1], "-o", tmp_path / "once")
    calls, whole = 0, phase.record

    def stopping(*arguments):
        nonlocal calls
        calls += 1
        if calls == 14:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(phase, "record", stopping)
    assert tpvc(*given, "--data", general[0], "--data", general[1], "-o", tmp_path / "twice").exit_code == 130
    monkeypatch.undo()
    assert list((tmp_path / "twice.partial" / "blocks" / "general-1").glob("block-*"))
    ok(*given, "--data", other, "--data", general[1], "-o", tmp_path / "twice", "--overwrite")
    assert (tmp_path / "once").read_bytes() == (tmp_path / "twice").read_bytes()


def test_what_diverges_in_a_later_text_leaves_nothing(refused, tiny_llama, general, tmp_path, monkeypatch):
    whole, phases = module.backward_of, 0

    def breaking(*arguments):
        nonlocal phases
        phases += 1
        return whole(*arguments) if phases == 1 else lambda see, indices: float("inf")

    monkeypatch.setattr(module, "backward_of", breaking)
    both = ("--data", general[0], "--data", general[1])
    said = refused("importance", tiny_llama, *both, "-o", tmp_path / "a", *FAST)
    assert said.startswith("on general text the loss is inf at step 0")
    assert not list(tmp_path.iterdir())


def test_a_rate_of_nothing_moves_nothing(ok, tiny_llama, general, tmp_path):
    """lr 1e-30 is lost in every weight: no importance, and coefficients that are all 1."""
    ok("importance", tiny_llama, "--data", general[0], "-o", tmp_path / "z", "--train", "weights", *FAST, "--lr", 1e-30)
    found = importance_file.read(tmp_path / "z")
    assert not any(c.codes.any() for c in found.omega.values()) and torch.equal(found.alpha, torch.ones(2))


def test_fisher_and_raw(ok, tiny_llama, general, tmp_path):
    told = ok("importance", tiny_llama, "--data", general[0], "-o", tmp_path / "f", "--method", "fisher", *FAST)
    found = importance_file.read(tmp_path / "f")
    assert told["manifest"]["method"] == "fisher" and not found.anchor and told["coefficients"] == [1, 1]
    assert all(c.dense.any() for c in found.omega.values())
    raw = ok("importance", tiny_llama, "--data", general[0], "-o", tmp_path / "r", "--coefficients", "raw", *FAST)
    assert sum(raw["coefficients"]) == pytest.approx(1, abs=1e-6)


def test_what_is_there_is_not_replaced_unless_it_is_ours(ok, refused, tiny_llama, general, tmp_path):
    given = ("importance", tiny_llama, "--data", general[0], *FAST)
    (tmp_path / "mine").write_text("a diary")
    assert "did not write" in refused(*given, "-o", tmp_path / "mine", "--overwrite")
    ok(*given, "-o", tmp_path / "a")
    assert "add --overwrite" in refused(*given, "-o", tmp_path / "a")
    ok(*given, "-o", tmp_path / "a", "--overwrite")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--nsamples", 4000), "use a longer text"),
        (("--nsamples", 3), "3 is not in the range x>=10"),
        (("--targets", "query"), "no linear called 'query'"),
        (("--targets", "all"), "which only weights can be"),
        (("--rank", 65), "expected 1 to"),
        (("--rank", 4, "--train", "road_1"), "a rank of 4 was asked for"),
        (("--method", "fisher", "--coefficients", "raw"), "no layer coefficients"),
        (("--lr", -1), "expected a rate above 0"),
        (("--lr", 1e30, "--train", "weights"), "on general text the loss is"),
        (("--lr", 1e30, "--train", "weights", "--batch-size", 64), "behind general text the loss is"),  # of one step
        (("--device", "cuda:9"), "cannot be used here"),
    ],
)
def test_bad_wishes_are_one_sentence(refused, tiny_llama, general, tmp_path, options, words):
    out = tmp_path / "out"
    assert words in refused("importance", tiny_llama, "--data", general[0], "-o", out, *FAST, *options)
    assert not list(tmp_path.iterdir())


def test_integers_have_no_weights_to_train(refused, ok, artefact, general, tmp_path):
    given = ("importance", artefact, "--data", general[0], *FAST)
    assert "holds integers" in refused(*given, "-o", tmp_path / "a", "--train", "weights")
    ok(*given, "-o", tmp_path / "b", "--train", "lora")
