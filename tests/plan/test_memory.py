"""The passes, run on tensors without memory, hold what their shapes say."""

import subprocess
import sys

import pytest
import torch

from tpvc.compiler.job import prepare
from tpvc.compiler.plan.memory import quantising


def peak(model, method="flexround", nsamples=16, head_bits=8, sampled=0, device="cpu", **options):
    job = prepare(model, method=method, nsamples=nsamples, head_bits=head_bits, steps=2, **options)
    return quantising(job, sampled, device=device)


def test_more_text_is_more_memory(tiny_llama):
    """Two streams of float32, which every block overwrites; in the closing step what enters the first block, and what
    leaves the last one in float. A tenth for tokens; with less text the peak may lie elsewhere."""
    stream = 512 * 256 * 64 * 4  # more than MAPPED
    for recipe in ("fast", "default"):
        few, many = (peak(tiny_llama, nsamples=n, recipe=recipe) for n in (512, 1024))
        assert few.device == 0
        assert 2 * stream < many.host - few.host < 2.1 * stream


@pytest.mark.parametrize("recipe", ["fast", "default"])
def test_one_window(tiny_llama, recipe):
    assert peak(tiny_llama, nsamples=1, recipe=recipe).host > 0


def test_nearest_takes_less_and_no_text(tiny_llama):
    assert peak(tiny_llama, "rtn", 16) == peak(tiny_llama, "rtn", 64)
    assert peak(tiny_llama, "rtn").host < peak(tiny_llama).host


def test_adapters_prompts_activations_and_sampling_run_too(tiny_llama, write_adapter, tmp_path):
    road = write_adapter(tiny_llama, tmp_path / "loud")
    for options in (
        {"roads": {"loud": road}},
        {"roads": {"loud": road}, "fold": True},
        {"activations": "int8", "bits": 8},
        {"sampled": 16},
        {"bits": 3, "group": 0, "symmetric": True},
        {"avg_bits": 4.0},
        {"avg_bits": 4.0, "method": "rtn"},
        {"avg_bits": 4.0, "roads": {"loud": road}},
    ):
        assert peak(tiny_llama, **options).host > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without CUDA, torch refuses to imagine a move there")
def test_a_device_holds_the_block_and_the_host_the_streams(tiny_llama):
    found = peak(tiny_llama, nsamples=128, device="cuda")
    assert found.device < found.host < peak(tiny_llama, nsamples=128).host


RUN = """
import json, sys
from dataclasses import replace
from torch import manual_seed, randn
from tpvc.compiler.bench import peak_bytes
from tpvc.compiler.plan.probe import _random, _resident
from tpvc.compiler.plan.memory import _round
from tpvc.compiler.job import prepare
import torch
job = prepare(sys.argv[1], method="flexround", nsamples=64, steps=2)
def run(program, n):
    with torch.no_grad():
        _round(program, replace(job, nsamples=n), 0, "cpu")
run(_random(job.program), 8)
from tpvc.compiler.freed import give_back
give_back()
before = _resident()
run(_random(job.program), 512)
print(before, peak_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_real_run_of_the_passes_holds_that_much(tiny_llama):
    """Streams of 34 MB each, beside some 400 MB that libraries take."""
    said = subprocess.run([sys.executable, "-c", RUN, tiny_llama], capture_output=True, text=True, check=True).stdout
    before, most = map(int, said.split())
    planned = peak(tiny_llama, nsamples=512).host
    assert abs(before + planned - most) < 0.15 * most
