"""`tpvc quantize`: what it leaves behind, and what it refuses."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import click
import pytest
import torch

from tpvc.compiler.cli.quantize import command, grid_options
from tpvc.compiler.errors import TpvcError
from tpvc.passes.flexround import RECIPES

TEXT = "A short line of words about rivers and bridges, with numbers such as 12 and 144. " * 40


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("typed", "grid"),
    [
        ((None, None, None, None), (4, None, False, None)),
        (("W4A16", None, 128, None), (4, 128, True, None)),
        (("W4A16", None, 128, True), (4, 128, True, None)),
        (("w3a16_asym", None, -1, None), (3, -1, False, None)),
        (("W8A16_ASYM", 8, 0, False), (8, 0, False, None)),
        ((None, 2, 64, None), (2, 64, False, None)),
        ((None, None, None, True), (4, None, True, None)),
        (("W8A8", None, -1, None), (8, -1, True, "int8")),
        (("w4a8_asym", None, -1, None, "int8"), (4, -1, False, "int8")),
        (("W4AFP8", None, 128, None), (4, 128, True, "fp8")),
        ((None, 8, -1, True, "int8"), (8, -1, True, "int8")),
        ((None, None, 64, None, None, 3.5), (None, 64, False, None, 3.5)),
    ],
)
def test_grid_options(typed, grid):
    assert tuple(grid_options(*typed).values()) == grid


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ((None, 1, None, None), "found 1 bits, expected 2 to 8"),
        ((None, 9, None, None), "found 9 bits, expected 2 to 8"),
        (("W1A16", None, None, None), "found 1 bits, expected 2 to 8"),
        (("W4A4", None, None, None), "unknown scheme 'W4A4'"),
        (("W4A8", None, None, None, "fp8"), "W4A8 and --activations fp8 contradict"),
        (("W4A16", None, None, None, "int8"), "W4A16 and --activations int8 contradict"),
        (("W4A16", 3, None, None), "contradict"),
        (("W4A16_ASYM", None, None, True), "W4A16_ASYM and --sym contradict"),
        (("W4A16", None, None, False), "W4A16 and --asym contradict"),
        ((None, None, -2, None), "found group size -2"),
        ((None, 3, None, None, None, 3.5), "--bits 3 and --avg-bits 3.5 contradict each other"),
        (("W4A16", None, None, None, None, 3.5), "--scheme W4A16 and --avg-bits 3.5 contradict each other"),
    ],
)
def test_grid_options_refuse(typed, says):
    with pytest.raises(TpvcError, match=says):
        grid_options(*typed)


def test_a_scheme_is_named_as_compressed_tensors_names_it():
    """Its own presets say which of the two has no zero points."""
    from compressed_tensors.quantization import preset_name_to_scheme

    for name in ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "W4AFP8"):
        preset = preset_name_to_scheme(name, ["Linear"])
        theirs, rows = preset.weights, preset.input_activations
        ours = grid_options(name, None, None, None)
        assert (ours["bits"], ours["symmetric"]) == (theirs.num_bits, theirs.symmetric)
        kind = None if rows is None else {"int": "int8", "float": "fp8"}[rows.type]
        assert ours["activations"] == kind and (
            rows is None or (rows.num_bits, rows.strategy, rows.dynamic) == (8, "token", True)
        )


def test_help_tells_the_steps_of_every_recipe():
    from tpvc.compiler.cli.quantize import command
    from tpvc.passes.flexround import RECIPES

    (option,) = (p for p in command.params if p.name == "recipe")
    assert set(option.type.choices) == set(RECIPES)
    assert re.findall(r"(\w+) (\d+)", option.help) == [(name, str(r.steps)) for name, r in RECIPES.items()]


def test_next_step_is_raw_without_a_chat_template(tpvc, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    for model, tail in ((tiny_llama, ""), (tmp_path / "model", " --raw")):
        out = tmp_path / f"w4{tail.strip()}"
        result = tpvc("quantize", model, "-o", out, "--method", "rtn")
        assert result.exit_code == 0, result.stderr
        assert f'tpvc run {out} "Hello"{tail}    or' in result.stdout
        result = tpvc("export", out, "-o", f"{out}-onnx")
        assert result.exit_code == 0, result.stderr
        assert f'tpvc run {out}-onnx "Hello"{tail}    or' in result.stdout


def test_rtn_leaves_an_artefact(ok, tiny_llama, tmp_path):
    found = ok("quantize", tiny_llama, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32)
    manifest = json.loads((tmp_path / "out" / "tpvc.json").read_text())
    assert found["manifest"] == manifest
    assert found["peak_bytes"] > 1e8
    assert manifest["options"]["bits"] == 4
    assert {"config.json", "model.safetensors", "report.html", "tokenizer.json"} <= files(tmp_path / "out").keys()
    assert os.listdir(tmp_path) == ["out"]


def test_same_command_same_bytes(ok, tiny_llama, tmp_path):
    """All but the report, which shows the time that every block took."""
    for name in ("a", "b"):
        ok("quantize", tiny_llama, "-o", tmp_path / name, "--method", "rtn", "--bits", 3, "--sym")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] in ([], ["report.html"])


def test_flexround_from_a_text_file(tpvc, tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--dataset", text, "--nsamples", 16, "--seqlen", 16, "--iters", 3, "--bits", 3, "--group-size", 32]
    result = tpvc("quantize", tiny_llama, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert "round-to-nearest" in result.stdout
    assert str(tmp_path / "out" / "report.html") in result.stdout
    records = json.loads((tmp_path / "out" / "tpvc.json").read_text())["blocks"]
    assert len(records) == 2
    assert all(r["error"] <= r["error_rtn"] * 1.0001 for r in records)


def test_missing_model(refused, tmp_path):
    assert "nowhere" in refused("quantize", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_empty_directory(refused, tmp_path):
    (tmp_path / "model").mkdir()
    assert "config.json" in refused("quantize", tmp_path / "model", "-o", tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(refused, tiny_llama, tmp_path, bits):
    assert "expected 2 to 8" in refused("quantize", tiny_llama, "-o", tmp_path / "out", "--bits", bits)
    assert not any(tmp_path.iterdir())


def test_group_size_that_does_not_divide_names_those_that_do(refused, tiny_llama, tmp_path):
    sentence = refused("quantize", tiny_llama, "-o", tmp_path / "out", "--group-size", 48)
    assert "48" in sentence and "32" in sentence and "64" in sentence
    assert not any(tmp_path.iterdir())


def test_text_too_short(refused, tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Too short.")
    sentence = refused("quantize", tiny_llama, "-o", tmp_path / "out", "--dataset", text, "--nsamples", 8)
    assert "token" in sentence
    assert os.listdir(tmp_path) == ["text.txt"]


def test_output_that_is_not_ours(refused, tiny_llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for more in ((), ("--overwrite",)):
        assert "did not write" in refused("quantize", tiny_llama, "-o", out, "--method", "rtn", *more)
    assert files(out) == {"thesis.txt": b"years of work"}


def test_output_that_is_ours_needs_overwrite(refused, ok, tiny_llama, tmp_path):
    command = ["quantize", tiny_llama, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32]
    ok(*command, "--bits", 4)
    assert "--overwrite" in refused(*command, "--bits", 8)
    ok(*command, "--bits", 8, "--overwrite")
    assert json.loads((tmp_path / "out" / "tpvc.json").read_text())["options"]["bits"] == 8
    assert os.listdir(tmp_path) == ["out"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")


def full_disk_in_a_library(*_, **__):
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("full", [full_disk, full_disk_in_a_library])
def test_disk_full(refused, tiny_llama, tmp_path, monkeypatch, full):
    from tpvc.compiler import pipeline

    monkeypatch.setattr(pipeline.huggingface, "emit", full)
    sentence = refused("quantize", tiny_llama, "-o", tmp_path / "out", "--method", "rtn")
    assert "the disk is full" in sentence
    assert not (tmp_path / "out").exists()


def no_memory(*_, **__):
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    )


def no_memory_on_a_device(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("full", [no_memory, no_memory_on_a_device, lambda *_, **__: bytearray(1 << 62)])
def test_memory_that_runs_out(refused, tiny_llama, tmp_path, monkeypatch, full):
    from tpvc.compiler import pipeline

    monkeypatch.setattr(pipeline.huggingface, "emit", full)
    assert "memory ran out" in refused("quantize", tiny_llama, "-o", tmp_path / "out", "--method", "rtn")
    assert not (tmp_path / "out").exists()


def test_unknown_device(refused, tiny_llama, tmp_path):
    command = ["quantize", tiny_llama, "-o", tmp_path / "out", "--dataset", "builtin", "--device", "toaster"]
    assert "toaster" in refused(*command)
    assert not (tmp_path / "out").exists()


def test_usage_errors_are_one_sentence(refused):
    assert "--bits" in refused("quantize", "x", "-o", "y", "--bits", "four")
    assert "--output" in refused("quantize", "x")
    assert "brew" in refused("brew")


INTERRUPTED = """
import os, signal, sys, threading, time

def interrupt(once_there):
    while not os.path.exists(once_there):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, args=(sys.argv.pop(1),), daemon=True).start()
from tpvc.compiler.cli import main; main()
"""
"""The command, with a Ctrl-C as soon as a file is there. From outside, a busy machine may be too late for it."""


def listen_to_interrupts() -> None:
    """Tests that run in the background of a shell inherit an ignored SIGINT; a terminal's foreground does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_leaves_nothing_and_the_run_goes_on(tiny_llama, tmp_path):
    """Ctrl-C in the second of two blocks: exit code 130, one sentence; the same command then ends well."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    first = tmp_path / "out.partial" / "blocks" / "block-00000.safetensors"
    main = [sys.executable, "-P", "-c", INTERRUPTED, first]
    options = ["--dataset", text, "--nsamples", 16, "--seqlen", 16, "--iters", 200, "--group-size", 32]
    command = [str(a) for a in [*main, "quantize", tiny_llama, "-o", out, *options]]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        start_new_session=True,
        preexec_fn=listen_to_interrupts,
        timeout=180,
    )
    assert run.returncode == 130, run.stderr
    assert run.stdout == ""
    assert [x for x in run.stderr.splitlines() if x.startswith("tpvc: ")] == [
        "tpvc: interrupted; the same command goes on after the last finished block"
    ]
    assert "Traceback" not in run.stderr
    assert not out.exists()

    written = first.stat().st_mtime_ns
    seen = []
    from tpvc.compiler import pipeline

    pipeline.quantize(
        str(tiny_llama),
        out,
        group=32,
        steps=200,
        dataset=str(text),
        nsamples=16,
        seqlen=16,
        progress=lambda *_: seen.append(first.stat().st_mtime_ns if first.exists() else written),
    )
    assert (out / "tpvc.json").is_file()
    assert set(seen) == {written}, "the finished block was computed again"


def test_the_help_tells_the_steps_of_every_recipe():
    told = " ".join(command.get_help(click.Context(command)).split())
    assert all(f"{name} {recipe.steps}" in told for name, recipe in RECIPES.items())
