"""Killed at drawn points, a command that is given again ends with the same bytes; more of it: benchmarks/kills.py."""

import random
import shutil
from pathlib import Path

import pytest
from trust_commands import COMMANDS, PAGES, arguments, tree
from trust_trials import trial

SLOW = ("export triton",)
"""Kernels are compiled for minutes; how they are kept one by one is in test_kept_kernels.py."""


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in SLOW])
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(forks, given, whole, tmp_path, name):
    found = trial(forks, given, name, whole(name), tmp_path, random.Random(name), "kill")
    assert found["wrong"] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_killed_command_leaves_no_half_of_a_page(forks, given, tmp_path, name):
    command, file = PAGES[name]
    folders = [tmp_path / part for part in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    typed = arguments(command, given, folders[0] / file)
    done = forks(typed, folders[0])
    assert done["code"] == 0 and done["calls"] > 2, done["said"]
    made = tree(folders[0] / file)
    for at in range(1, done["calls"] + 1):
        again = arguments(command, given, folders[1] / file)
        assert forks(again, folders[1], fault=-9, at=at)["code"] == -9
        assert tree(folders[1] / file) is None
    assert forks(again, folders[1])["code"] == 0
    assert tree(folders[1] / file) == made


def test_every_call_of_a_short_command(forks, given, whole, tmp_path):
    """At each of its calls, over an artefact that it replaces: OUT is the old one, the new one, or briefly neither."""
    name, old = "road compose", "prompt add"
    folder, kept = tmp_path / "killed", tmp_path / "out"
    folder.mkdir()
    typed = [*arguments(COMMANDS[name], given, folder / "out"), "--overwrite"]
    assert forks(arguments(COMMANDS[old], given, kept), folder)["code"] == 0
    shutil.copytree(kept, folder / "out")
    before, gone, at = tree(kept), 0, 1
    while (done := forks(typed, folder, fault=-9, at=at))["code"] == -9:
        found = tree(folder / "out")
        assert found in (None, before, whole(name)["tree"])
        gone += found is None
        assert forks(typed[:-1], folder)["code"] in (0, 2)  # without --overwrite: what stood there is there again
        if found is None or found == before:
            assert tree(folder / "out") == before
            assert [p.name for p in folder.iterdir()] == ["out"]
        shutil.rmtree(folder / "out")
        shutil.copytree(kept, folder / "out")
        at += 1
    assert done["code"] == 0 and at > 10 and gone == 1
    assert tree(folder / "out") == whole(name)["tree"]


def test_what_was_finished_is_not_done_again(forks, given, whole, tmp_path):
    """Killed at the last call before its artefact is written, a run makes few calls more."""
    name = "road tune"
    typed = arguments(COMMANDS[name], given, tmp_path / "out")
    assert forks(typed, tmp_path, fault=-9, at=whole(name)["calls"] - 20)["code"] == -9
    assert len(list((tmp_path / "out.partial" / "blocks").glob("block-*"))) == 7
    done = forks(typed, tmp_path)
    assert done["code"] == 0 and done["calls"] < whole(name)["calls"] / 2
    assert tree(tmp_path / "out") == whole(name)["tree"]


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("quantize", ["--iters", "5"], "steps is 4, not 5"),
        ("road tune", ["--lr", "0.06"], "lr is 0.05, not 0.06"),
        ("prompt tune", ["--seed", "1"], "seed is 0, not 1"),
        ("importance", ["--lr", "0.01"], "training is "),
        ("finetune lora", ["--method", "l2"], 'method is "hierarchical", not "l2"'),
    ],
)
def test_other_options_are_noticed(forks, given, whole, tmp_path, name, more, says):
    typed = arguments(COMMANDS[name], given, tmp_path / "out")
    assert forks(typed, tmp_path, fault=-9, at=whole(name)["calls"] // 2)["code"] == -9
    refused = forks(typed + more, tmp_path)
    assert refused["code"] == 2 and says in refused["said"] and "--overwrite" in refused["said"]
    assert forks(typed, tmp_path)["code"] == 0
    assert tree(tmp_path / "out") == whole(name)["tree"]


@pytest.mark.parametrize(
    ("name", "file", "says"),
    [
        ("quantize", "text", "calibration is "),
        ("road tune", "examples", "tokens is "),
        ("importance", "text", "texts is "),
    ],
)
def test_another_input_is_noticed(forks, given, whole, tmp_path, name, file, says):
    changed = tmp_path / Path(given[file]).name
    text = Path(given[file]).read_text()
    changed.write_text(text)
    typed = arguments(COMMANDS[name], {**given, file: str(changed)}, tmp_path / "out")
    assert forks(typed, tmp_path, fault=-9, at=whole(name)["calls"] // 2)["code"] == -9
    changed.write_text(text.replace("dog", "cat").replace("day", "sun"))
    refused = forks(typed, tmp_path)
    assert refused["code"] == 2 and says in refused["said"]
