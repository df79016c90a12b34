"""Two processes that share the calibration windows write what one writes; where one of them ends, so does the other."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import tpvc
from tpvc.compiler import frontends, quick
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import QTensor, read
from tpvc.compiler.tuning.parallel import Ranks, ranks
from tpvc.passes.flexround import RECIPES, most_processes
from tpvc.passes.share import Share

RUNS = """
import json, sys
import tpvc
from tpvc.compiler import quick

quick.has_units = lambda device: False
for options in json.loads(sys.argv[1]):
    tpvc.quantize(**options)
"""
KILLED = """
import os, signal
from tpvc.compiler import quick
from tpvc.compiler.cli import main
from tpvc.compiler.store import BlockStore

quick.has_units = lambda device: False

def keep(self, block, streams, share=0, inner=BlockStore.keep):
    inner(self, block, streams, share)
    if (block, share) == (1, 1):
        os.kill(os.getpid(), signal.SIGKILL)

BlockStore.keep = keep
main()
"""
SILENT = """
import time
from datetime import timedelta
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning import parallel

parallel.PATIENCE = timedelta(seconds=1)
with parallel.ranks("cpu") as own:
    time.sleep(600 * own.rank)
    try:
        own.wait()
    except TpvcError as error:
        print(error)
"""
SMALL = {"nsamples": 40, "seqlen": 16}
STEPS, LR, LR_SCALE = 12, RECIPES["default"].lr, RECIPES["default"].lr_scale


def torchrun(folder, *runs) -> None:
    """`runs`, options of quantize, one after another in the same two processes."""
    (folder / "runs.py").write_text(RUNS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "runs.py"]
    told = json.dumps(runs, default=str)
    done = subprocess.run([*command, told], cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def environment(**more: object) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in more.items()}}


def started(script: str, *arguments: object) -> list[subprocess.Popen]:
    """Two processes as torchrun starts them, but none ends the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment(**where, RANK=r, LOCAL_RANK=r), **pipes) for r in (0, 1)]


def files(folder) -> dict[str, bytes]:
    """All but the one that tells seconds."""
    found = (f for f in folder.rglob("*") if f.is_file() and f.name != "report.html")
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def rounded(folder) -> dict[str, QTensor]:
    program = frontends.load(folder, integers=True)
    return {n: q for n, p in program.params.items() if isinstance(q := read(p), QTensor)}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_window_is_one_process_s(count):
    stream = torch.arange(29.0)[:, None, None]
    shares = [Share(Ranks(r, count), 29) for r in range(count)]
    assert sorted(i for share in shares for i in share.own) == list(range(29))
    for share in shares:
        held = stream[share.own]
        assert held[: share.among(18)].flatten().tolist() == [i for i in share.own if i < 18]
        for place, index in enumerate(share.own):
            assert share._owner(index) == share.ranks.rank and held[share._place(index)] == index == held[place]
    assert torch.equal(Share(Ranks(), 29).rows(stream, [7, 28, 3]), stream[[7, 28, 3]])


def test_two_processes_write_what_one_writes(tiny_llama, tmp_path, monkeypatch):
    """Without a step the same bytes: streams, importance, grids and errors add up in one order. With steps gradients do
    not.

    A gradient's sum over at most 64 tokens is off by 2^-18 of its terms; terms may cancel to 2^-6 of their size. Adam's
    step follows its sign and size relative to earlier ones, so that a logarithm is off by STEPS * rate * 2^-12, and a
    code, at most 15, is another where it lies that near to an edge.
    """
    monkeypatch.setattr(quick, "has_units", lambda device: False)
    runs = {
        "searched": {"bits": 3, "recipe": "fast", "steps": 0},
        "static": {"bits": 8, "activations": "int8-static", "recipe": "fast", "steps": 0},
        "learned": {"bits": 4, "recipe": "default", "steps": STEPS},
    }
    runs = {name: {"model": tiny_llama, **SMALL, **options} for name, options in runs.items()}
    torchrun(tmp_path, *({"out": tmp_path / f"{name}2", **options} for name, options in runs.items()))
    for name, options in runs.items():
        tpvc.quantize(out=tmp_path / name, **options)
    for name in ("searched", "static"):
        assert files(tmp_path / name) == files(tmp_path / f"{name}2")
    one, two = rounded(tmp_path / "learned"), rounded(tmp_path / "learned2")
    far = torch.cat([(one[n].codes.int() - two[n].codes.int()).abs().flatten() for n in one])
    assert int(far.max()) <= 1 and float((far > 0).float().mean()) < 2 * 15 * STEPS * LR * 2**-12
    for n in one:
        assert float((one[n].scale / two[n].scale - 1).abs().max()) < 2 * STEPS * LR_SCALE * 2**-12
    assert not list(tmp_path.glob("*.partial"))


def test_where_one_is_killed_the_other_ends_and_both_go_on(tiny_llama, tmp_path):
    options = {"model": tiny_llama, **SMALL, "recipe": "fast", "steps": 2}
    typed = [tiny_llama, "--nsamples=40", "--seqlen=16", "--recipe=fast", "--iters=2"]
    first, second = started(KILLED, "quantize", *typed, "-o", tmp_path / "out")
    assert second.wait(100) == -9
    said = first.communicate(timeout=100)[1].strip().splitlines()
    assert first.returncode == 2 and said[-1].startswith("tpvc: another process of this run has ended"), said
    assert not any("Traceback" in line for line in said) and not (tmp_path / "out").exists()
    with pytest.raises(TpvcError, match="processes is 2, not 1"):
        tpvc.quantize(out=tmp_path / "out", **options)
    torchrun(tmp_path, {"out": tmp_path / "out", **options}, {"out": tmp_path / "whole", **options})
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_process_that_is_not_heard_of_is_given_up():
    first, second = started(SILENT)
    try:
        said, _ = first.communicate(timeout=60)
    finally:
        second.kill()
        second.communicate()
    assert "not heard of any more" in said


def test_what_cannot_be_shared_is_refused(tiny_llama, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TpvcError, match="without torchrun"):
        tpvc.quantize(tiny_llama, tmp_path / "out", method="rtn")
    with pytest.raises(TpvcError, match="start at most 1,"):
        tpvc.quantize(tiny_llama, tmp_path / "out", nsamples=9, seqlen=16)
    with pytest.raises(TpvcError, match="write cuda"), ranks("cuda:0"):
        pass


def test_every_process_has_a_part_of_every_batch():
    assert [most_processes(RECIPES["default"], n) for n in (1, 9, 10, 24, 25, 128)] == [1, 1, 2, 3, 3, 4]
    assert most_processes(RECIPES["paper"], 128) == 2
