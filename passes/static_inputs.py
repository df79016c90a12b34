"""The grids of `round_tensor` nodes: one scale and zero point for all tokens, found on calibration text.

What a node meets behind the prefix that is rounded already is watched on the first windows, and every node by itself
gets the range [max(min x, -c), min(max x, c)] whose c loses least. Lost is

    sum_t |e_t|^2 / sum_t |x_t|^2  +  mean_t |e_t|^2 / |x_t|^2,    |x|^2 = sum_i h_i x_i^2

with e_t the error of token t and h_i the squared length of column i of what reads it, so that it stands for the error
of the output. The first sum is about the few giant tokens that attention leans on, the second about all the others. A
value in which the ones are so much larger that no grid holds both is rounded per token instead (`round_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpvc.compiler.ops import TENSOR_RANGE, round_tensor
from tpvc.compiler.program import INPUT_ROUNDERS, Node, Program, linears
from tpvc.compiler.progress import Progress, silent
from tpvc.passes.block import AT_ONCE, EXACT, Block, behind_prompts, embedded, spread

WINDOWS = 16
"""Of the calibration text that are looked at."""
CLIPS = tuple(0.85**k for k in range(28))
"""Where a range may end, relative to the largest entry: down to 1 %."""
LIMIT = 0.02
"""What a static grid may lose; beyond it a value is rounded per token."""


@dataclass(frozen=True)
class StaticInputs:
    """The pass, for weights that are rounded before it without looking at activations.

    windows      int64 [n, L] calibration tokens
    scale_dtype  dtype the scales are stored in; they are exact in it
    """

    windows: Tensor
    scale_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    progress: Progress = silent

    @torch.no_grad()
    def __call__(self, program: Program) -> Program:
        windows = behind_prompts(self.windows[: looked_at(program)], program)
        ids = spread(len(windows), len(program.adapters))
        x = embedded(program, windows, ids)
        for index in range(program.blocks):
            self.progress("static inputs", index, program.blocks, f"block {index}")
            program = with_grids(program, index, x, ids, self.scale_dtype, self.device)
            block = Block(program, index, self.device)
            x = block.outputs(x, block.weights, ids)
        self.progress("static inputs", program.blocks, program.blocks, "")
        return program


@torch.no_grad()
def with_grids(
    program: Program, index: int, x: Tensor, ids: Tensor, dtype: torch.dtype, device: str = "cpu"
) -> Program:
    """The program with the grids of block `index`, whose input is x [n, L, D] with the adapters `ids` [n]."""
    nodes = [n for n in program.block(index) if n.op == "round_tensor" and n.attrs["scale"] is None]
    if not nodes:
        return program
    block, seen, names = Block(program, index, device), {}, {n.name for n in nodes}

    def watch(node: Node, inputs: list[Tensor]) -> None:
        if node.name in names:
            seen.setdefault(node.name, []).append(inputs[0].flatten(0, 1))

    few = slice(0, looked_at(program))
    for part, own in zip(x[few].split(AT_ONCE), ids[few].split(AT_ONCE), strict=True):
        block.output(part, block.weights, own, watch, EXACT)
    found = {}
    for name, parts in seen.items():
        readers = {n.params["weight"] for n in linears(block.nodes) if n.inputs[0] == name}
        columns = torch.stack([block.weights[w].square().sum(0) for w in sorted(readers)]).sum(0)
        scale, zero, least = search(torch.cat(parts), columns, dtype)
        static = ("round_tensor", {"scale": scale, "zero": zero})
        found[name] = static if least <= LIMIT else ("round_rows", {"kind": "int8"})
    return _with(program, found)


def search(
    x: Tensor, columns: Tensor, dtype: torch.dtype, clips: tuple[float, ...] = CLIPS
) -> tuple[float, int, float]:
    """(scale, zero point, what is lost) of the grid for x [T, D]; columns [D]: squared lengths of the columns."""
    power = x.square() @ columns
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    best = None
    for clip in clips:
        most = clip * max(-low, high)
        scale, zero = grid_of_range(max(low, -most), min(high, most), dtype)
        error = (round_tensor(x, scale=scale, zero=zero) - x).square() @ columns
        found = lost(error, power)
        if best is None or found < best[2]:
            best = scale, zero, found
    return best


def lost(error: Tensor, power: Tensor) -> float:
    """What errors [T] lose of powers [T]: their sums against each other, and token by token."""
    tiny = torch.finfo(torch.float32).tiny
    return (error.sum() / power.sum().clamp(min=tiny) + (error / power.clamp(min=tiny)).mean()).item()


def grid_of_range(low: float, high: float, dtype: torch.dtype) -> tuple[float, int]:
    """(scale, zero point) of the grid from `low` <= 0 to `high` >= 0; the scale is exact in `dtype`."""
    least, most = TENSOR_RANGE
    scale = torch.tensor((high - low) / (most - least), dtype=torch.float32).to(dtype)
    scale = scale.clamp(min=torch.finfo(dtype).tiny).item()
    return scale, int(min(max(round(least - low / scale), least), most))


def with_any_grids(program: Program) -> Program:
    """The program with some grid where none is found yet: for whoever asks how long it takes and not what comes out."""
    nodes = [n for n in program.nodes if n.op == "round_tensor" and n.attrs["scale"] is None]
    return _with(program, {n.name: (n.op, {"scale": 1.0, "zero": 0}) for n in nodes})


def recorded(program: Program, index: int) -> dict[str, list]:
    """What a record of block `index` says about how its inputs are rounded; nothing where none is."""
    told = [{"name": n.name, "op": n.op, **n.attrs} for n in program.block(index) if n.op in INPUT_ROUNDERS]
    return {"inputs": told} if told else {}


def with_recorded(program: Program, record: Mapping) -> Program:
    """The inverse: the program with the grids that the record of a block tells."""
    told = [dict(entry) for entry in record.get("inputs", ())]
    return _with(program, {entry.pop("name"): (entry.pop("op"), entry) for entry in told})


def _with(program: Program, found: Mapping[str, tuple[str, Mapping]]) -> Program:
    """The program with other ops and attributes of the nodes in `found`."""
    if not found:
        return program

    def changed(node: Node) -> Node:
        op, attrs = found.get(node.name, (node.op, node.attrs))
        return replace(node, op=op, attrs=attrs)

    return replace(program, nodes=tuple(changed(n) for n in program.nodes))


def looked_at(program: Program) -> int:
    """How many windows: all adapters have met all prompts in them."""
    return max(WINDOWS, (len(program.adapters) + 1) * (len(program.prompts) + 1))
