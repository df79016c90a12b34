"""Widths within a budget: what they cost, which linears share one, and the choice against all others."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid
from tpvc.compiler.weight_bytes import matrix_bits
from tpvc.passes.spend_bits import WIDTHS, Fused, average, check_budget, fused, grids, spend

GRID = Grid(4, 16, False)


def random_groups(seed: int, count: int = 5) -> list[Fused]:
    """Groups of different sizes, whose damages fall with the width, in no special way."""
    draw = torch.Generator().manual_seed(seed)
    groups = []
    for i in range(count):
        rows = int(torch.randint(1, 9, (1,), generator=draw)) * 16
        costs = {b: matrix_bits((rows, 64), replace(GRID, bits=b), torch.float16) for b in WIDTHS}
        falling = torch.rand(len(WIDTHS), generator=draw).sort(descending=True).values.tolist()
        groups.append(Fused(i, (f"n{i}",), (f"w{i}",), rows * 64, costs, dict(zip(WIDTHS, falling, strict=True))))
    return groups


def test_linears_that_read_one_value_share_a_width(small_llama):
    groups = fused(small_llama, GRID, torch.float16)
    assert [g.block for g in groups] == [i for i in range(3) for _ in range(4)]
    last = [tuple(n.rpartition(".")[2] for n in g.names) for g in groups[:4]]
    assert last == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    chosen = grids(groups, [2, 3, 4, 8] * 3, GRID)
    assert {g.bits for name, g in chosen.items() if "layers.1.mlp.down" in name} == {8}
    assert {g.bits for name, g in chosen.items() if "layers.1.self_attn.q" in name or ".1.self_attn.v" in name} == {2}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_against_every_other_choice(seed, share):
    """Within the budget, and worse than the best of all by no more than the dearest single step saves."""
    groups = random_groups(seed)
    least, most = (average(groups, [end(WIDTHS)] * len(groups)) for end in (min, max))
    budget = least + share * (most - least)
    check_budget(groups, budget)

    def damage(widths) -> float:
        return sum(g.damages[b] for g, b in zip(groups, widths, strict=True))

    chosen = spend(groups, budget)
    assert average(groups, chosen) <= budget
    best = min(damage(w) for w in product(WIDTHS, repeat=len(groups)) if average(groups, w) <= budget)
    step = max(g.damages[min(WIDTHS)] - g.damages[max(WIDTHS)] for g in groups)
    assert best <= damage(chosen) <= best + step
    if share == 1.0:
        assert damage(chosen) == best


def test_equal_groups_and_a_width_that_damages_more_than_a_smaller_one():
    """Noise may say that 3 bits are worse than 2: nobody pays for that."""
    odd = [replace(g, damages={2: 1.0, 3: 1.5, 4: 0.5, 8: 0.5}) for g in random_groups(0)]
    assert set(spend(odd, 8)) == {4}


def test_a_budget_that_nothing_fits():
    groups = random_groups(0)
    with pytest.raises(TpvcError, match=r"average of 2 bits, expected 3\.125 to 9\.500: codes of 2 to 8 bits"):
        check_budget(groups, 2)
    with pytest.raises(TpvcError, match="average of 16 bits"):
        check_budget(groups, 16)
