"""Kernels of a package are kept one by one, so that a build that is killed goes on."""

from pathlib import Path

import pytest
import torch

import tpvc.kernels
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.store import BlockStore
from tpvc.kernels import aot
from tpvc.kernels.launch import Launch
from tpvc.kernels.targets import named

pytest.importorskip("triton")
HALF = torch.zeros(4096, dtype=torch.float16)


@pytest.fixture
def jobs(monkeypatch):
    """Two kernels that compile, and one that cannot."""
    monkeypatch.setattr(tpvc.kernels, "__path__", [*tpvc.kernels.__path__, str(Path(__file__).parents[1] / "kernels")])
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def of(**constants):
        arguments = (HALF, HALF, None, HALF, 2, 256, 0.5)
        return aot.variant_of(Launch("tiny_kernels:scaled_sum", (2, 1, 1), arguments, {"BIAS": False, **constants}, 4))

    return [(of(BLOCK=block), named("hip:gfx942")) for block in (128, 256, 3)]


def test_what_was_compiled_is_not_compiled_again(jobs, tmp_path):
    class Killed(BaseException):
        pass

    def kill(stage, done, total, note):
        if done == 2:
            raise Killed

    store = BlockStore.open(tmp_path / "blocks", {})
    with pytest.raises(Killed):
        aot.compile_all(jobs, kill, 1, store)
    seen = []
    built = aot.compile_all(jobs, lambda stage, done, total, note: seen.append(done), 1, store)
    assert seen == [2, 3]
    assert built == aot.compile_all(jobs, workers=1)
    assert isinstance(built[2], str) and isinstance(built[0], aot.Binary)
    assert aot.compile_all(jobs, lambda stage, done, total, note: seen.append(done), 1, store) == built
    assert seen == [2, 3, 3]
    other = aot.compile_all([jobs[1]], workers=1, store=store)  # at its place in the store is another one
    assert other == [built[1]]


def test_a_compiler_that_is_killed_is_no_fault_of_a_kernel(jobs, tmp_path, monkeypatch):
    """For want of memory, say: a package without that kernel would differ from run to run."""
    (tmp_path / "deadly.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(tpvc.kernels, "__path__", [*tpvc.kernels.__path__, str(tmp_path)])
    with pytest.raises(TpvcError, match=r"killed \(signal 9\)"):
        aot.compile_all([(aot.Variant("deadly:kernel", (), (), 4, 2, ()), named("cuda:80"))])


def test_a_full_disk_is_no_fault_of_a_kernel(tmp_path, monkeypatch):
    (tmp_path / "full.py").write_text("import errno\nraise OSError(errno.ENOSPC, 'No space left on device')\n")
    monkeypatch.setattr(tpvc.kernels, "__path__", [*tpvc.kernels.__path__, str(tmp_path)])
    with pytest.raises(OSError, match="No space left on device"):
        aot.compile_all([(aot.Variant("full:kernel", (), (), 4, 2, ()), named("cuda:80"))])
