"""Output directories: what is refused, what is left when the work fails, and that nothing of a user's is removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import MANIFEST, check_apart, check_free, published


def tree(directory: Path) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): p.read_text() for p in directory.rglob("*") if p.is_file()}


def write(out: Path, text: str, **options) -> None:
    with published(out, **{"overwrite": False, **options}) as work:
        (work / "artefact" / MANIFEST).write_text(text)


def finish_a_block(out: Path) -> Path:
    """What a quantisation that was stopped after its first block leaves."""
    block = out.with_name(f"{out.name}.partial") / "blocks" / "block-00000.safetensors"
    block.parent.mkdir(parents=True)
    block.write_text("hours of work")
    return block


def test_appears_when_whole_and_is_replaced_when_asked(tmp_path):
    out = tmp_path / "new" / "out"
    write(out, "first")
    with pytest.raises(TpvcError, match="--overwrite"):
        write(out, "second")
    assert tree(tmp_path) == {f"new/out/{MANIFEST}": "first"}
    write(out, "second", overwrite=True)
    assert tree(tmp_path) == {f"new/out/{MANIFEST}": "second"}


@pytest.mark.parametrize("resumable", [False, True])
def test_a_failure_leaves_nothing(tmp_path, resumable):
    with pytest.raises(KeyboardInterrupt), published(tmp_path / "out", False, resumable) as work:
        (work / "artefact" / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_resumable_failure_leaves_its_finished_blocks(tmp_path):
    block = finish_a_block(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), published(tmp_path / "out", False, resumable=True) as work:
        (work / "artefact" / "half").write_text("x")
        raise KeyboardInterrupt
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [block]


def test_what_stood_there_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    write(tmp_path / "out", "first")
    real = os.replace

    def fail(source, target):
        if Path(source).name == "artefact":
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write(tmp_path / "out", "second", overwrite=True)
    assert tree(tmp_path) == {f"out/{MANIFEST}": "first"}


def test_an_unfinished_quantisation_is_not_removed_by_an_export(tmp_path):
    block = finish_a_block(tmp_path / "out")
    with pytest.raises(TpvcError, match="unfinished"):
        write(tmp_path / "out", "x")
    assert block.read_text() == "hours of work"
    write(tmp_path / "out", "x", overwrite=True)
    assert tree(tmp_path) == {f"out/{MANIFEST}": "x"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resumable", [False, True])
def test_two_runs_do_not_write_to_one_output(tmp_path, resumable, overwrite):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with published(out, False, resumable) as work:
        block = work / "blocks" / "block-00000.safetensors"
        block.parent.mkdir()
        block.write_text("hours of work")
        (work / "artefact" / MANIFEST).write_text("first")
        before = tree(tmp_path)
        with pytest.raises(TpvcError, match=r"another run is writing '.*out\.partial'"):
            write(out, "second", resumable=resumable, overwrite=overwrite)
        assert tree(tmp_path) == before
    assert tree(tmp_path) == {f"out/{MANIFEST}": "first"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path):
    pytest.importorskip("fcntl")
    code = (
        "import sys, time; from pathlib import Path; from tpvc.compiler.output import published\n"
        "with published(Path(sys.argv[1]), False, True): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(TpvcError, match="another run"):
        write(tmp_path / "out", "x")
    other.kill()
    other.communicate()
    assert (tmp_path / "out.partial" / "lock").exists()
    write(tmp_path / "out", "x")
    assert tree(tmp_path) == {f"out/{MANIFEST}": "x"}


def test_an_output_that_is_or_holds_the_model(tmp_path):
    model = tmp_path / "all" / "model"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for out in (model, model.parent, tmp_path / "link", model / ".." / "model"):
        with pytest.raises(TpvcError, match="would be lost"):
            check_apart(out, str(model))
    for out in (model / "w4", tmp_path / "all" / "mod", tmp_path / ("x" * 300)):
        check_apart(out, str(model))
    check_apart(tmp_path / "owner" / "name", "owner/name")


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_working_name_that_is_taken_is_refused(tmp_path, kind):
    taken = tmp_path / "out.partial"
    if kind == "directory":
        taken.mkdir()
        taken = taken / "thesis.txt"
    taken.write_text("years of work")
    for attempt in (lambda: check_free(tmp_path / "out", True), lambda: write(tmp_path / "out", "x", overwrite=True)):
        with pytest.raises(TpvcError, match="is not tpvc's"):
            attempt()
    assert taken.read_text() == "years of work"


def test_places_that_cannot_be_renamed_into(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "disk").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for out, said in {
        ".": "working directory",
        "..": "working directory",
        "/": "working directory|mount point",
        "../file": "is a file",
        "../file/out": "not a directory",
        "../link": "not a directory",
        "../disk": "is a link to .*here'; name the directory itself",
        "x" * 300: "too long",
    }.items():
        with pytest.raises(TpvcError, match=said):
            check_free(Path(out), True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no file system that takes no directories")
def test_a_place_that_takes_no_directories():
    with pytest.raises(TpvcError, match="'/proc' takes no new directory"), published(Path("/proc/tpvc-out"), False):
        pass
