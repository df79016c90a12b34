"""Give every matrix its width so that the average stays within a budget and the sum of the damages is least.

Linears of a block that read one value become one matrix in some runtimes (queries, keys and values; gate and up) and
share a width. What a width costs are the bits of codes, scales and zero points; what it damages is measured
(`measure_damage.py`), and damages add up. So this is a knapsack with one choice a group: of every group the widths on
the lower convex hull of (cost, damage) are taken one after another, over all groups in the order of what a bit saves,
and a step that does not fit any more ends its group. Until then the choice is the best of all that cost as much; what
is lost against the exact optimum is at most what the first step that did not fit would have saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, Node, Program, linears
from tpvc.compiler.weight_bytes import matrix_bits

WIDTHS = (2, 3, 4, 8)
"""What is chosen from: the widths that every format of several widths holds."""


@dataclass(frozen=True)
class Fused:
    """Linears of a block that read one value.

    names, weights  of the linears, and of their matrices
    numbers         how many weights
    costs           {width: bits of codes, scales and zero points}
    damages         {width: nats a token}; empty until somebody measured them
    """

    block: int
    names: tuple[str, ...]
    weights: tuple[str, ...]
    numbers: int
    costs: Mapping[int, int]
    damages: Mapping[int, float] = field(default_factory=dict)


def fused(program: Program, grid: Grid, scale_dtype: torch.dtype, widths: Sequence[int] = WIDTHS) -> tuple[Fused, ...]:
    """The groups of all blocks in order, without damages; of `grid` all but the bits counts."""
    found: dict[tuple[int, str], list[Node]] = {}
    for node in linears(n for n in program.nodes if n.block is not None):
        found.setdefault((node.block, node.inputs[0]), []).append(node)
    groups = []
    for (block, _), nodes in found.items():
        weights = tuple(n.params["weight"] for n in nodes)
        shapes = [tuple(program.params[w].shape) for w in weights]
        costs = {b: sum(matrix_bits(s, replace(grid, bits=b), scale_dtype) for s in shapes) for b in widths}
        groups.append(Fused(block, tuple(n.name for n in nodes), weights, sum(map(prod, shapes)), costs))
    return tuple(groups)


def average(groups: Sequence[Fused], widths: Sequence[int]) -> float:
    """Bits a weight where the groups have these widths."""
    return sum(g.costs[b] for g, b in zip(groups, widths, strict=True)) / sum(g.numbers for g in groups)


def check_budget(groups: Sequence[Fused], avg_bits: float) -> None:
    """TpvcError for an average below that of the least width, or above that of the largest."""
    least, most = (average(groups, [end(g.costs) for g in groups]) for end in (min, max))
    if not least <= avg_bits <= most:
        few, many = min(groups[0].costs), max(groups[0].costs)
        raise TpvcError(
            f"found an average of {avg_bits:g} bits, expected {least:.3f} to {most:.3f}: codes of {few} to {many} bits"
            " with their scales and zero points; choose with --avg-bits"
        )


def spend(groups: Sequence[Fused], avg_bits: float) -> tuple[int, ...]:
    """The width of every group; their average is at most `avg_bits`, which `check_budget` has let pass."""
    widths = [min(g.costs) for g in groups]
    left = avg_bits * sum(g.numbers for g in groups) - sum(g.costs[b] for g, b in zip(groups, widths, strict=True))
    steps = [(-gain, i, n, bits) for i, g in enumerate(groups) for n, (bits, gain) in enumerate(_hull(g))]
    ended: set[int] = set()
    for _, i, _, bits in sorted(steps):
        cost = groups[i].costs[bits] - groups[i].costs[widths[i]]
        if cost > left:
            ended.add(i)
        elif i not in ended and cost > 0:
            widths[i], left = bits, left - cost
    return tuple(widths)


def _hull(group: Fused) -> list[tuple[int, float]]:
    """[(width, damage that every bit on the way to it saves), ...] from the least width upwards; gains fall."""
    found, here = [], min(group.costs)
    while True:
        gains = [
            ((group.damages[here] - group.damages[b]) / (group.costs[b] - group.costs[here]), b)
            for b in group.costs
            if b > here and group.damages[b] < group.damages[here]
        ]
        if not gains:
            return found
        gain, here = max(gains)
        found.append((here, gain))


def grids(groups: Sequence[Fused], widths: Sequence[int], grid: Grid) -> dict[str, Grid]:
    """{weight: its grid}, which is `grid` but for the bits."""
    return {w: replace(grid, bits=b) for g, b in zip(groups, widths, strict=True) for w in g.weights}
