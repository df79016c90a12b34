"""What does not fit in a package is noticed before anything is computed."""

import math
from dataclasses import replace

import pytest
import torch

from tpvc.compiler.backends.triton import DAMAGE, sound
from tpvc.compiler.backends.triton.model import Task, model_of
from tpvc.compiler.frontends import load
from tpvc.compiler.program import Grid, dense, linears
from tpvc.kernels.slab import Slabs
from tpvc.passes.round_to_nearest import quantize


@pytest.fixture(scope="module")
def model(tiny_llama):
    program = load(tiny_llama)
    names = [n.params["weight"] for n in linears(program.nodes) if n.block is not None]
    grids = {name: Grid(bits, 16, False) for name, bits in zip(names, (3, 4, 8) * 5, strict=False)}
    rounded = {n: quantize(dense(program.params[n]), grid, torch.float16) for n, grid in grids.items()}
    return model_of(program.with_params(rounded), torch.float16)


def test_what_was_made_is_sound(model):
    sound.check(model)


@pytest.mark.parametrize(
    "facts",
    [{"context_length": 2**40}, {"head_dim": -64}, {"head_dim": 7}, {"heads": "4"}, {"layers": True}, {"eos": ("x",)}],
    ids=str,
)
def test_sizes(model, facts):
    with pytest.raises(DAMAGE):
        sound.check(replace(model, facts=replace(model.facts, **facts)))


@pytest.mark.parametrize(
    "part",
    [
        {"depth": math.inf},
        {"depth": 0},
        {"depth": 10**9},
        {"group": 0},
        {"group": 7},
        {"bits": 5},
        {"bits": 16},
        {"middle": -1},
        {"scale": None},
        {"zero": torch.zeros(1, 1, dtype=torch.uint8)},
        {"high": torch.zeros(1, 1, dtype=torch.int32)},
        {"words": torch.zeros(3, dtype=torch.int32)},
    ],
    ids=lambda part: next(f"{k} {v if not isinstance(v, torch.Tensor) else list(v.shape)}" for k, v in part.items()),
)
def test_slabs(model, part):
    integers = [n for n, p in model.params.items() if isinstance(p, Slabs) and p.bits == 4]
    broken = replace(model.params[integers[0]], **part)
    with pytest.raises(DAMAGE):
        sound.check(replace(model, params={**model.params, integers[0]: broken}))


@pytest.mark.parametrize(
    "change",
    [
        {"op": "import"},
        {"op": ["linear"]},
        {"params": {"weight": "nothing"}},
        {"params": {}},
        {"inputs": ()},
        {"attrs": 3},
    ],
    ids=str,
)
def test_steps(model, change):
    at = next(i for i, step in enumerate(model.steps) if step.op == "linear")
    steps = (*model.steps[:at], replace(model.steps[at], **change), *model.steps[at + 1 :])
    with pytest.raises(DAMAGE):
        sound.check(replace(model, steps=steps))


def test_tasks(model):
    for task in (Task("a", -1), Task("a", 10**9), Task(3, 1)):
        with pytest.raises(DAMAGE):
            sound.check(replace(model, tasks=(task,)))
