"""`tpvc bench`: a row for every target."""

import pytest

QUICK = ["--prompt-tokens", 8, "--new-tokens", 8, "--runs", 2, "--threads", 1]


def test_rows_and_picture(ok, tiny_llama, artefact, exported, tmp_path):
    found = ok("bench", tiny_llama, artefact, exported, *QUICK, "--png", tmp_path / "speed.png")
    assert [r["target"] for r in found["rows"]] == [str(tiny_llama), str(artefact), str(exported)]
    assert found["threads"] == 1
    for row in found["rows"]:
        assert len(row["runs"]) == 2
        assert min(row["decode"], row["prefill"], row["first_token"], row["load"]) > 0
        assert row["peak"] > row["size"]
    float_size, small, _ = (r["size"] for r in found["rows"])
    assert small < float_size / 2
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_table_shows_ratios_to_the_first(tpvc, exported):
    result = tpvc("bench", exported, exported, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "medians of 2 runs" in result.stdout
    assert "(1.00x)" in result.stdout


def test_bad_input(refused, exported, tmp_path):
    assert "nowhere" in refused("bench", exported, tmp_path / "nowhere", *QUICK)
    assert "context" in refused("bench", exported, "--prompt-tokens", 1000)
    assert "TARGETS" in refused("bench")
    for name in ("nowhere/speed.png", "speed.txt"):
        assert "picture" in refused("bench", exported, "--png", tmp_path / name)


def test_a_worker_that_dies_is_reported(monkeypatch, exported):
    from tpvc.compiler import bench
    from tpvc.compiler.errors import TpvcError

    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(TpvcError, match="exit code 1"):
        bench.bench([str(exported)], prompt_tokens=8, new_tokens=8, runs=1)
