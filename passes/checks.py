"""What every rounding pass refuses before it starts, and what it says about a linear afterwards."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, Grids, Node, Program, QTensor, grid_of, linears
from tpvc.passes.block import AT_ONCE
from tpvc.passes.grid import on_grid, span_of


def check_grid(grids: Grids, program: Program, nodes: tuple[Node, ...]) -> None:
    """Refuse bits outside 2..8 and groups that do not divide every weight, naming those that do."""
    for grid in [grids] if isinstance(grids, Grid) else set(grids.values()):
        _check_grid(grid, program, nodes)


def _check_grid(grid: Grid, program: Program, nodes: tuple[Node, ...]) -> None:
    if not 2 <= grid.bits <= 8:
        raise TpvcError(f"bits is {grid.bits}; expected a width from 2 to 8")
    if grid.group < -1:
        raise TpvcError(f"group size is {grid.group}; expected a positive size, -1 (per channel) or 0 (per tensor)")
    columns = {program.params[n.params["weight"]].shape[1] for n in linears(nodes)}
    if grid.group > 0 and any(c % grid.group for c in columns):
        common = math.gcd(*columns)
        fits = [g for g in range(2, min(common, 512) + 1) if common % g == 0][-8:]
        raise TpvcError(
            f"group size {grid.group} does not divide the {', '.join(map(str, sorted(columns)))} columns of this"
            f" model's weights; sizes that do: {', '.join(map(str, fits)) or 'none'}; or -1 for one scale per channel"
        )


def check_float(program: Program, nodes: tuple[Node, ...]) -> None:
    """Refuse weights that are integers already: rounding twice loses what the first rounding kept."""
    for name in (n.params["weight"] for n in linears(nodes)):
        if grid_of(program.params[name]) is not None:
            raise TpvcError(
                f"'{name}' is already quantised; expected a float checkpoint, as rounding twice loses accuracy"
            )


def check_finite(program: Program, what: str, values: Tensor, ids: Tensor) -> None:
    """Refuse values [n, ...] of windows with adapters `ids` int64 [n] that are not finite, and say under which."""
    whole = torch.cat([part.flatten(1).isfinite().all(1) for part in values.split(AT_ONCE)]).cpu()
    if not whole.all():
        spoiled = ids[~whole].unique().tolist()
        owners = ", ".join(program.adapters[i].name if i >= 0 else "the base" for i in spoiled)
        raise TpvcError(f"{what} yields numbers that are not finite with {owners}; use intact weights and adapters")


def linear_record(node: Node, value: QTensor, weight: Tensor | None = None) -> dict:
    """What the manifest says about one linear; flips: the share of codes that are not those nearest to `weight`
    [out, in] on the grid they lie on. Without it they are."""
    nearest = value
    if weight is not None:
        nearest = on_grid(weight, span_of(value, weight.device), value.grid, value.scale_dtype)
    flips = int(torch.count_nonzero(value.codes != nearest.codes)) / value.codes.numel()
    return {
        "name": node.name,
        "shape": list(value.shape),
        "grid": str(value.grid),
        "bits": value.grid.bits,
        "flips": float(f"{flips:.6g}"),
    }
