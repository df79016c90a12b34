"""What a run of quantize is to do is checked before anything is read or written."""

import pytest

import tpvc
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.job import check_processes, default_group, prepare
from tpvc.passes.flexround import RECIPES


def test_default_group_divides_every_weight(tiny_llama):
    assert default_group(tpvc.load(tiny_llama)) == 64


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "gptq"}, "expected flexround or rtn"),
        ({"recipe": "slow"}, "fast, default, best, lrq, paper"),
        ({"head_bits": 1}, "head bits is 1"),
        ({"seqlen": 1}, "windows of 1 token"),
        ({"group": 48}, "32, 64"),
        ({"bits": 9}, "2 to 8"),
        ({"steps": -5}, "found -5 steps a block; expected 0"),
    ],
)
def test_bad_options_are_one_sentence_before_any_work(tiny_llama, tmp_path, options, says):
    with pytest.raises(TpvcError) as error:
        tpvc.quantize(tiny_llama, tmp_path / "out", **options)
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_adapter_has_a_window_that_is_learned_from(tiny_llama, write_adapter, tmp_path):
    """The last eighth is held out: of 8 windows the one that the seventh of seven adapters would have."""
    roads = {f"r{i}": write_adapter(tiny_llama, tmp_path / f"r{i}", i) for i in range(7)}
    with pytest.raises(TpvcError, match=r"8 calibration windows, 1 of them held out, do not go round .* at least 9$"):
        prepare(tiny_llama, roads=roads, nsamples=8)
    assert prepare(tiny_llama, roads=roads, nsamples=9).nsamples == 9
    assert prepare(tiny_llama, roads=roads, nsamples=8, recipe="paper").nsamples == 8
    assert prepare(tiny_llama, roads=roads, nsamples=8, method="rtn").nsamples == 8


def torchrun(monkeypatch, processes: int) -> None:
    """The environment of the first of so many."""
    told = {"WORLD_SIZE": processes, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("processes", "windows", "says"),
    [(8, 128, "start at most 4$"), (4, 16, "start at most 2, or ask for more windows$")],
)
def test_too_many_processes_are_told_what_would_help(monkeypatch, processes, windows, says):
    torchrun(monkeypatch, processes)
    with pytest.raises(TpvcError, match=says):
        check_processes("flexround", RECIPES["default"], windows)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 .*, and RANK, MASTER_ADDR, MASTER_PORT not set; start .* with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "and MASTER_PORT not set"),
        ({"WORLD_SIZE": "x", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE is 'x'"),
    ],
)
def test_half_of_what_torchrun_says_is_a_sentence(monkeypatch, tiny_llama, tmp_path, told, says):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TpvcError, match=says):
        tpvc.quantize(tiny_llama, tmp_path / "out", method="rtn")
