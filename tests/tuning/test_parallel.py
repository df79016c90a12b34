"""Two processes that torchrun starts find what one finds, in both phases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tpvc.compiler.finetune_pipeline import finetune
from tpvc.compiler.tuning.parallel import Ranks, ranks

RUN = """
import sys
from tpvc.compiler.cli import main
main()
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    general, domain = folder / "general.txt", folder / "domain.txt"
    general.write_text(" ".join(f"The dog number {i} sleeps on, and the fox jumps." for i in range(60)))
    domain.write_text(" ".join(f"def area{i}(width): return width * {i}" for i in range(80)))
    return general, domain


def test_alone():
    with ranks("cpu") as own:
        assert (own.rank, own.count) == (0, 1) and own.own([4, 5, 6]) == [4, 5, 6]
    shares = [i for r in range(3) for i in Ranks(r, 3).own(list(range(7)))]
    assert sorted(shares) == list(range(7))


@pytest.mark.parametrize("train", ["weights", "lora"])
def test_two_processes_find_what_one_finds(tiny_llama, texts, tmp_path, train):
    """Gradients are sums in another order: a step's direction is off by some 2^-20, of 12 steps of at most the rate.

    AdamW divides by the root of squared gradients, so that an element whose gradient is as small as its error may go
    anywhere within the rate; there must be few of these.
    """
    general, domain = texts
    lr, wishes = 1e-3, {"train": train, "steps": 6, "batch_size": 6, "max_length": 16, "nsamples": 40, "phi": 0.5}
    finetune(tiny_llama, domain, tmp_path / "one", general=general, lr=lr, **wishes)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    typed = [f"--{key.replace('_', '-')}={value}" for key, value in wishes.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["finetune", str(tiny_llama), "--data", str(domain), "--general", str(general), f"--lr={lr}", *typed]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written in") == 1  # one of them speaks
    file = "model.safetensors" if train == "weights" else "adapter_model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    far = torch.cat([(one[n] - two[n]).abs().flatten() for n in one])
    assert float(far.max()) <= 12 * lr
    assert float((far > 12 * lr * 2**-8).float().mean()) < 0.01
    assert not list(Path(tmp_path).glob("*.partial"))
