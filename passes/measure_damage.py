"""What rounding a few linears at a time costs the whole model, to be added up.

With the linears of one group rounded and all else in float, the output of their block moves by d, and

    KL(float || rounded)  =  1/2 E_y[(g_y . d)^2]  + higher orders,      g_y = gradient of log p(y) at that output

where y are tokens drawn from the float model's own predictions, one for every position (the Fisher information of the
logits: E g g^T is the Hessian of KL). So one pass forwards in float and one backwards, block by block, are all that the
rest of the model is needed for: what a width costs is told by one pass through its own block. g takes as many backward
passes as there are draws.

The mean is over a few draws on a few windows, and every few tokens of a window are squared by themselves: tokens that
are further apart hardly add up, and many small squares have a steadier mean than one large one.

Above 4 bits products in bfloat16 would measure their own error; there, damage falls with the square of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpvc.compiler.freed import give_back
from tpvc.compiler.program import Grid, Program, QTensor
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.quick import QUICK
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning.parallel import ALONE, SharedStore
from tpvc.passes.block import Block, behind_prompts, embedded, spread, unrounded
from tpvc.passes.checks import check_float
from tpvc.passes.grid import on_grid, to_nearest
from tpvc.passes.grid_search import search
from tpvc.passes.sensitivity import backwards, logit_gradients, looked_at
from tpvc.passes.spend_bits import Fused

LENGTH = 128
"""Tokens of each, where no soft prompt takes more."""
TOGETHER = 8
"""Tokens whose g . d are added before they are squared."""
DRAWS = 8
"""Of a token for every position."""
MEASURED = 4
"""Bits up to which a width is tried; a wider one is reckoned from this one."""
FLOAT = unrounded(QUICK)


@dataclass(frozen=True)
class MeasureDamage:
    """Called with a float Program and the groups of its linears it returns these with their damages.

    grid         of all groups but for the bits
    searched     grids are searched, as FlexRound starts; otherwise they span the extremes, as rounding to nearest does
    windows      int64 [n, L] calibration tokens
    store        where the blocks that were measured lie, so that an interrupted run goes on; from the last one down
    """

    grid: Grid
    searched: bool
    windows: Tensor
    store: BlockStore | SharedStore
    seed: int = 0
    scale_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    progress: Progress = silent

    @torch.no_grad()
    def __call__(self, program: Program, groups: Sequence[Fused]) -> tuple[Fused, ...]:
        check_float(program, tuple(n for n in program.nodes if n.block is not None))
        done = program.blocks
        while done and self.store.finished(done - 1) is not None:
            done -= 1
        if done:
            self.measure(program, groups, done)
        records = [self.store.finished(index)[1] for index in range(program.blocks)]
        told = {names: d for r in records for names, d in ((tuple(g["names"]), g["damages"]) for g in r["groups"])}
        return tuple(replace(g, damages={b: told[g.names][str(b)] for b in g.costs}) for g in groups)

    def measure(self, program: Program, groups: Sequence[Fused], unfinished: int) -> None:
        """Measure the blocks below `unfinished`, the last one first."""
        windows = behind_prompts(self.windows[: looked_at(program), : length(program)], program)
        ids = spread(len(windows), len(program.adapters))
        entering = [embedded(program, windows, ids)]
        for index in range(program.blocks if unfinished == program.blocks else unfinished):
            self.progress("measure bits", 0, program.blocks, f"forwards, block {index}")
            block = Block(program, index, self.device)
            entering.append(block.outputs(entering[-1], block.weights, ids, FLOAT))
        if unfinished == program.blocks:
            gradients = logit_gradients(program, entering[-1], ids, DRAWS, self.seed, self.device, FLOAT)
        else:
            gradients = self.store.streams(unfinished)["gradients"]
        for index in reversed(range(unfinished)):
            self.progress("measure bits", program.blocks - 1 - index, program.blocks, f"block {index}")
            give_back()
            exact, x = entering.pop(), entering[-1]
            block = Block(program, index, self.device)
            told = self._damages(block, x, exact, ids, gradients, [g for g in groups if g.block == index])
            if index:
                gradients = backwards(block, x, ids, gradients, FLOAT)
            self.store.save(index, {}, {"block": index, "groups": told}, {"gradients": gradients})
        self.progress("measure bits", program.blocks, program.blocks, "")

    def _damages(
        self, block: Block, x: Tensor, exact: Tensor, ids: Tensor, gradients: Tensor, groups: list[Fused]
    ) -> list[dict]:
        """[{"names", "damages": {width: nats a token}}, ...] of the groups of a block, from what enters it and what
        leaves it in float."""
        importance = block.importance(x, ids, len(x), ALONE, FLOAT) if self.searched else {}
        told = []
        for group in groups:
            damages: dict[int, float] = {}
            for bits in sorted(group.costs):
                if bits > MEASURED:
                    damages[bits] = damages[MEASURED] * ((2**MEASURED - 1) / (2**bits - 1)) ** 2
                    continue
                rounded = {w: self._rounded(block.weights[w], importance.get(w), bits) for w in group.weights}
                moved = block.outputs(x, block.with_rounded(rounded), ids, FLOAT) - exact
                parts = (gradients * moved).sum(3).double().split(TOGETHER, 2)
                damages[bits] = float(sum(part.sum(2).square().mean() for part in parts)) / (2 * x.shape[1])
            kept = {str(b): float(f"{d:.6g}") for b, d in damages.items()}
            told.append({"names": list(group.names), "damages": kept})
        return told

    def _rounded(self, weight: Tensor, importance: Tensor | None, bits: int) -> QTensor:
        grid = replace(self.grid, bits=bits)
        if importance is None:
            return to_nearest(weight, grid, self.scale_dtype)
        return on_grid(weight, search(weight, importance, grid, self.scale_dtype), grid, self.scale_dtype)


def length(program: Program) -> int:
    """Tokens of a window: there is text behind every prompt."""
    return max(LENGTH, 2 * max((p.tokens for p in program.prompts), default=0))
