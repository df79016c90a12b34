"""benchmarks/peers: which rows a command means, what its table says of several seeds, and what a child took."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "peers"


@pytest.fixture
def peers(monkeypatch):
    """{name: module} of the harness, which imports its files by their bare names; these are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(PEERS))
    names = ("rows", "table", "child", "environments", "run")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_rows_are_chosen_by_whole_words(peers):
    names = [row.name for row in peers["rows"].chosen("autoround W3 g64 sym, gptq W2 asym")]
    assert names == [
        "autoround W3 g64 sym seed 0",
        "gptq W2 g64 asym",
        "autoround W3 g64 sym seed 1",
        "autoround W3 g64 sym seed 2",
    ]


def test_row_names_are_unique_and_unknown_ones_are_refused(peers):
    names = [row.name for row in peers["rows"].rows()]
    assert len(names) == len(set(names))
    with pytest.raises(ValueError, match="fits no row"):
        peers["rows"].chosen("gptq, gptq W5")


def test_every_method_has_a_script_and_an_environment(peers):
    for method in peers["rows"].METHODS:
        assert method.environment in peers["rows"].ENVIRONMENTS
        assert (PEERS / f"with_{method.environment}.py").is_file()


def test_table_means_over_seeds_and_ratios_on_the_same_grid(peers):
    def figures(perplexity: float, minutes: float) -> dict:
        quality = {"perplexity": perplexity, "stderr": 1.0, "kl": 0.5, "top1": 0.75}
        return {**quality, "minutes": 3.0, "cpu_minutes": minutes, "peak_gib": 2.0}

    found = {
        "float32": {"perplexity": 10.0, "stderr": 0.5},
        "autoround W3 g64 sym seed 0": figures(20.0, 10.0),
        "autoround W3 g64 sym seed 1": figures(22.0, 10.0),
        "tpvc-rtn W3 g64 sym": figures(42.0, 1.0),
        "tpvc-rtn W3 g64 asym": figures(40.0, 1.0),
        "gptq W3 g64 sym": {"minutes": 1.0},  # not scored yet
    }
    text = peers["table"].markdown(found, [], "autoround")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    lines = {(line[0], line[1]): line for line in cells}
    assert lines["autoround", "W3 g64 sym"][2] == "21.00 ± 1.41 (2)"  # deviation of 20 and 22: sqrt(2)
    assert lines["tpvc-rtn", "W3 g64 sym"][-3:] == ["2", "0.1", "1"]
    assert lines["tpvc-rtn", "W3 g64 asym"][-3:] == ["", "", ""]
    assert lines["float32", ""][2] == "10.00"
    assert ("gptq", "W3 g64 sym") not in lines
    assert len({len(line) for line in cells}) == 1


def test_a_child_is_measured_and_its_failure_told(peers, tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(
        "import json, sys\nsaid = json.load(open(sys.argv[1]))\nheld = b'x' * said['bytes']\n"
        "print('this went wrong')\nsys.exit(said['code'])\n"
    )
    run, python = peers["child"].run, Path(sys.executable)
    took = run(python, script, {"bytes": 2**28, "code": 0}, tmp_path / "work", log, 1)
    assert took["peak_gib"] >= 0.25
    assert took["minutes"] > 0 and took["cpu_minutes"] > 0
    assert not (tmp_path / "work").exists()
    with pytest.raises(peers["child"].Failed, match="ended with 3: this went wrong"):
        run(python, script, {"bytes": 1, "code": 3}, tmp_path / "work", log, 1)


def test_a_row_that_was_published_is_not_lost_when_it_cannot_be_made_again(peers, monkeypatch, tmp_path):
    """Its checkpoint was removed: nothing is to be done; where it is to be checked too, a failure keeps the figures."""
    run, name = peers["run"], "gptq W3 g64 sym"
    wanted = [row for row in peers["rows"].rows() if row.name == name]
    results = {"rows": {name: {"minutes": 1.0, "perplexity": 40.0}}, "failed": {}}

    def fail(*args):
        raise peers["child"].Failed("out of disk")

    monkeypatch.setattr(run, "make", fail)
    args = argparse.Namespace(out=tmp_path, cross_check=False)
    assert run.finish(name, wanted, args, results)
    args.cross_check = True
    assert not run.finish(name, wanted, args, results)
    assert results == {"rows": {name: {"minutes": 1.0, "perplexity": 40.0}}, "failed": {name: "out of disk"}}
