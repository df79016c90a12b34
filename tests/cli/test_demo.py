"""`tpvc demo` with a tiny model in the demo model's place."""

import os

import pytest


@pytest.fixture
def tiny_demo(monkeypatch, tiny_llama):
    import sys

    from tpvc.compiler.frontends import demo

    monkeypatch.setattr(demo, "fetch", lambda progress=None: tiny_llama)
    module = sys.modules["tpvc.compiler.cli.demo"]
    monkeypatch.setattr(module, "MODEL", str(tiny_llama))
    monkeypatch.setattr(module, "GRID", {"bits": 4, "group": 32, "symmetric": False})


def test_the_whole_way(tpvc, tiny_demo, tmp_path):
    result = tpvc("demo", "-o", tmp_path / "demo", "--threads", 1)
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    assert {"w4", "w4-rtn", "onnx", "bench.png"} == set(os.listdir(tmp_path / "demo"))
    for word in ("FlexRound", "perplexity", "decode tok/s", "report.html", "Done in"):
        assert word in result.stdout


def test_again_and_as_json(ok, tiny_demo, tmp_path):
    found = ok("demo", "-o", tmp_path / "demo", "--threads", 1)
    assert [r["target"].rsplit("/", 1)[-1] for r in found["eval"]] == ["w4-rtn", "w4"]
    assert len(found["bench"]) == 2
    assert isinstance(found["answer"], str)
