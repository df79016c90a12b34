"""Disks that are full, read-only or broken, signals, files that go, two runs at once, clocks that jump."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trust_commands import COMMANDS, arguments, tree
from trust_trials import trial

from tpvc.compiler.cli import console
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.export_pipeline import export
from tpvc.compiler.pipeline import quantize

NAMES = ("quantize", "importance", "export onnx")
OPTIONS = {"group": 32, "steps": 2, "nsamples": 16, "seqlen": 16}


@pytest.mark.parametrize("fault", ["full", "read-only", "broken", "term", "int"])
@pytest.mark.parametrize("name", NAMES)
def test_one_sentence_and_the_same_command_goes_on(forks, given, whole, tmp_path, name, fault):
    found = trial(forks, given, name, whole(name), tmp_path, random.Random(f"{name} {fault}"), fault)
    assert found["wrong"] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_what_was_finished(forks, given, whole, tmp_path, number, code):
    name = "quantize"
    typed = arguments(COMMANDS[name], given, tmp_path / "out")
    done = forks(typed, tmp_path, fault=-number, at=whole(name)["calls"] // 2)
    assert done["code"] == code
    assert done["said"].splitlines()[-1] == "tpvc: interrupted; the same command goes on after the last finished block"
    assert list((tmp_path / "out.partial" / "blocks").glob("block-*"))
    assert not (tmp_path / "out.partial" / "artefact").exists()
    assert forks(typed, tmp_path)["code"] == 0
    assert tree(tmp_path / "out") == whole(name)["tree"]


def test_the_script_itself_ends_so(given, tmp_path):
    """Not a fork: `tpvc` as it is started by a shell, with SIGTERM at its first word."""
    typed = arguments(
        "quantize {model} --nsamples 16 --seqlen 16 --iters 100000 --group-size 32", given, tmp_path / "out"
    )
    code = "from tpvc.compiler.cli import main; main()"
    run = subprocess.Popen([sys.executable, "-c", code, *typed], stderr=subprocess.PIPE, text=True)
    said = ""
    while "FlexRound" not in said:
        said = run.stderr.readline()
    run.terminate()
    said = run.stderr.read()
    assert run.wait() == 143 and said.splitlines()[-1].startswith("tpvc: interrupted; the same command goes on")
    assert list(tmp_path.iterdir()) == []  # no block was finished


def test_the_wall_clock_goes_back_all_the_time(forks, given, whole, tmp_path):
    for name in ("quantize", "export onnx"):
        done = forks(arguments(COMMANDS[name], given, tmp_path / name), tmp_path, clock=86400)
        assert done["code"] == 0, done["said"]
        assert tree(tmp_path / name) == whole(name)["tree"]


def test_the_time_that_is_left_is_never_negative(monkeypatch, capsys):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.Bars() as bars:
        bars.EVERY = -(10**9)
        for done in range(5):
            bars("tune", done, 4, "")
    said = capsys.readouterr().err
    assert said.count("tune") == 5 and "-" not in said


def model_of(given, folder: Path) -> Path:
    return Path(shutil.copytree(given["model"], folder / "model"))


def at(stage: str, done: int, act):
    """A Progress that acts once, at a moment."""
    acted = []

    def progress(now, count, total, note):
        if (now, count) == (stage, done) and not acted:
            acted.append(True)
            act()

    return progress


@pytest.mark.parametrize("moment", [("check", 3), ("FlexRound", 0), ("FlexRound", 1)])
def test_weights_that_go_while_they_are_read(given, whole, tmp_path, moment):
    model = model_of(given, tmp_path)
    away = tmp_path / "away"
    options = {**OPTIONS, "dataset": given["text"]}
    with pytest.raises(TpvcError, match=r"model\.safetensors"):
        quantize(model, tmp_path / "out", progress=at(*moment, lambda: os.rename(model, away)), **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == (moment == ("FlexRound", 1))
    os.rename(away, model)
    quantize(model, tmp_path / "out", **options)
    quantize(model, tmp_path / "once", **options)
    assert {k: v for k, v in tree(tmp_path / "out").items() if k != "report.html"} == {
        k: v for k, v in tree(tmp_path / "once").items() if k != "report.html"
    }


def test_weights_that_are_cut_while_they_are_read(given, tmp_path):
    model = model_of(given, tmp_path)
    weights = model / "model.safetensors"
    cut = at("FlexRound", 1, lambda: weights.write_bytes(weights.read_bytes()[:-100]))
    with pytest.raises(TpvcError, match="not a complete safetensors file"):
        quantize(model, tmp_path / "out", progress=cut, dataset=given["text"], **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("work", ["quantize", "export"])
def test_weights_that_change_while_they_are_read(given, tmp_path, monkeypatch, work):
    """Half of the one and half of the other would be a model of nobody."""
    from tpvc.compiler.backends import onnx

    model, emit = model_of(given, tmp_path), onnx.emit
    weights = model / "model.safetensors"

    def other(*given, **options):
        if given:
            emit(*given, **options)
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        os.utime(weights, (1, 1))

    monkeypatch.setattr(onnx, "emit", other)
    with pytest.raises(TpvcError, match="was changed while it was read"):
        if work == "quantize":
            progress = at("FlexRound", 1, other)
            quantize(model, tmp_path / "out", progress=progress, dataset=given["text"], **OPTIONS)
        else:
            export(model, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_a_second_run_is_refused_while_the_first_is_at_work(forks, given, tmp_path):
    typed = arguments(COMMANDS["quantize"], given, tmp_path / "out")
    seen = []

    def second():
        for more in ([], ["--overwrite"]):
            seen.append(forks(typed + more, tmp_path))
        seen.append(forks(arguments(COMMANDS["export vllm"], given, tmp_path / "out"), tmp_path))

    quantize(given["model"], tmp_path / "out", progress=at("FlexRound", 1, second), dataset=given["text"], **OPTIONS)
    for done in seen:
        assert done["code"] == 2
        assert done["said"].splitlines()[-1].startswith("tpvc: another run is writing ")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "tpvc.json").exists()
