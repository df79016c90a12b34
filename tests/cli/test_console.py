"""Progress in a log file, JSON that is legal, help."""

import json

from tpvc.compiler.cli import console


def test_a_log_gets_a_line_at_the_start_and_one_at_the_end(capsys):
    with console.Bars() as bars:
        for i in range(101):
            bars("flexround", i, 100, "block")
        bars("flexround", 100, 100, "block")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("flexround: 0/100 block")
    assert lines[1].startswith("flexround: 100/100 block done in")


def test_blocks_of_an_earlier_run_tell_no_speed(monkeypatch, capsys):
    """20 of 30 were there; one more takes 60 s, so that the other nine take 540."""
    clock = iter([0.0, 60.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.Bars() as bars:
        bars("flexround", 20, 30, "block 20")
        bars("flexround", 21, 30, "block 20")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "flexround: 20/30 block 20"
    assert second == "flexround: 21/30 block 20 9 min 00 s left"


def test_a_terminal_gets_one_bar_a_stage(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.Bars() as bars:
        bars("load", 1, 1, "")
        bars("flexround", 1, 4, "block 0")
    err = capsys.readouterr().err
    assert "load" in err and "1/4" in err and "left" in err


def test_json_has_no_nan(capsys):
    console.print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (1, None)}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": {"d": [1, None]}}


def test_help_of_every_command_has_examples(tpvc):
    from tpvc.compiler.cli import cli

    assert "First steps" in tpvc("--help").stdout
    for name in cli.commands:
        result = tpvc(name, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout
        assert "Examples:" in result.stdout or name == "demo"
    assert tpvc().exit_code == 2
    assert tpvc("--version").stdout.startswith("tpvc, version ")


def test_paths_are_told_and_typed_as_they_are(capsys, tmp_path):
    """Not as markup, and as a shell takes them."""
    console.out().print(console.written(tmp_path / "runs[w4]\x1b", 1.0, "3 numbers"))
    assert "runs[w4]\\x1b written in 1.0 s, 3 numbers" in capsys.readouterr().out.replace("\n", "")
    assert console.run_command(tmp_path / "my model") == f"tpvc run '{tmp_path}/my model' \"Hello\" --raw"


def test_names_in_tables_and_bars_are_no_markup(monkeypatch, capsys):
    made = console.table("of [a]", "name [b]", "n")
    made.add_row("model[/x]", "1")
    console.out().print(made)
    told = capsys.readouterr().out
    assert all(name in told for name in ("of [a]", "name [b]", "model[/x]"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.Bars() as bars:
        bars("load[/x]", 1, 1, "model[/y]")
    told = capsys.readouterr().err
    assert "load[/x]" in told and "model[/y]" in told
