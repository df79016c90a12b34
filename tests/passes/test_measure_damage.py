"""What rounding a group costs, against the divergence of the logits it is about; resuming; adapters and prompts."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler import interpret
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import Grid, Program, dense
from tpvc.compiler.quick import QUICK
from tpvc.compiler.store import BlockStore
from tpvc.passes import measure_damage, sensitivity
from tpvc.passes.block import embedded, full_windows, spread
from tpvc.passes.measure_damage import MeasureDamage
from tpvc.passes.round_to_nearest import quantize
from tpvc.passes.sensitivity import logit_gradients
from tpvc.passes.spend_bits import fused

GRID = Grid(4, 16, False)
DRAWS, COUNT = 64, 16


def windows(count=COUNT, length=24) -> torch.Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(1))


def measure(path, **options) -> MeasureDamage:
    return MeasureDamage(GRID, False, windows(), BlockStore.open(path, {}), **options)


def divergence(program: Program, names: tuple[str, ...], bits: int) -> float:
    """KL(float || rounded), nats a token, of the whole model with these weights alone rounded to nearest."""
    rounded = {w: quantize(dense(program.params[w]), replace(GRID, bits=bits)) for w in names}
    tokens = windows()
    wanted, found = (interpret.logits(p, tokens).log_softmax(-1) for p in (program, program.with_params(rounded)))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.fixture
def many(monkeypatch):
    """So many draws on so many windows that the mean says something about such a small model."""
    monkeypatch.setattr(measure_damage, "DRAWS", DRAWS)
    monkeypatch.setattr(sensitivity, "WINDOWS", COUNT)


@torch.no_grad()
def test_it_is_the_divergence_of_the_logits(small_llama, tmp_path, many):
    """To second order. The mean square of n normal numbers is off by sqrt(2 / n) of itself; n counts windows alone, as
    draws on a window share what moves, and its parts stand side by side: sqrt(2 / 16) = 0.35 and, at 4 bits, little
    else. Three of these are allowed for each of 12 groups, and one for their sum."""
    groups = measure(tmp_path)(small_llama, fused(small_llama, GRID, torch.float32))
    direct = [divergence(small_llama, g.weights, 4) for g in groups]
    for group, wanted in zip(groups, direct, strict=True):
        assert abs(group.damages[4] / wanted - 1) < 3 * (2 / COUNT) ** 0.5
        assert group.damages[2] > group.damages[3] > group.damages[4] > group.damages[8]
    total = sum(g.damages[4] for g in groups)
    assert abs(total / sum(direct) - 1) < (2 / COUNT) ** 0.5


def test_gradients_are_those_of_the_drawn_tokens(small_llama, tmp_path):
    """Of the sum of log p of tokens that the float model's own chances draw, by automatic differentiation."""
    tool, ids = measure(tmp_path), spread(1, 0)
    with torch.no_grad():
        x = embedded(small_llama, windows(1), ids)
        for index in range(3):
            block = measure_damage.Block(small_llama, index, "cpu")
            x = block.outputs(x, block.weights, ids)
        gradients = logit_gradients(small_llama, x, ids, measure_damage.DRAWS, tool.seed, "cpu", measure_damage.FLOAT)
    leaving = x.clone().requires_grad_()
    values = full_windows(windows(1), ids) | {small_llama.epilogue[0].inputs[0]: leaving}
    found, quick = (
        interpret.run(small_llama.epilogue, values, interpret.from_files(small_llama), ops=ops).log_softmax(-1)
        for ops in (OPS, QUICK)
    )
    draw = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(quick.detach().exp()[0], measure_damage.DRAWS, replacement=True, generator=draw)
    for i, gradient in enumerate(gradients):
        (wanted,) = torch.autograd.grad(found[0].gather(1, tokens[:, i : i + 1]).sum(), leaving, retain_graph=True)
        # factors and products in bfloat16 are off by 2^-8 at most, in the logits and in what goes back
        assert (gradient - wanted).norm() < 2**-7 * wanted.norm()


def test_an_interrupted_run_goes_on_with_the_same_numbers(small_llama, tmp_path):
    groups = fused(small_llama, GRID, torch.float32)
    whole = measure(tmp_path / "whole")(small_llama, groups)
    assert measure(tmp_path / "whole")(small_llama, groups) == whole

    def stop(stage: str, done: int, total: int, note: str) -> None:
        if note == "block 0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "cut", progress=stop)(small_llama, groups)
    seen = []
    resumed = measure(tmp_path / "cut", progress=lambda _, done, total, note: seen.append(note))(small_llama, groups)
    assert resumed == whole
    assert "block 1" not in seen, "a finished block was measured again"


def test_another_seed_draws_other_tokens(small_llama, tmp_path):
    groups = fused(small_llama, GRID, torch.float32)
    assert measure(tmp_path / "a")(small_llama, groups) != measure(tmp_path / "b", seed=1)(small_llama, groups)
