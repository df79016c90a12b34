"""FlexRound: learned rounding by element-wise division (Lee et al., ICML 2023, arXiv 2306.00317).

For every linear with weight W [out, in] (Eq. 1-2):

    W_hat = s1 * clamp(round(W / (s1 * S2 * s3)), -z, 2^b - 1 - z)

s1 is the grid, one scale per tensor, row or group, and all that is deployed next to the codes; S2 [out, in] and
s3 [out, 1] only choose the codes and are thrown away. All three are positive and learned as logarithms, relative to
where they start, so that step 0 is rounding to nearest on the starting grid, bit for bit.

One block at a time, all its linears jointly:

    minimise || block_float(x_float) - block_rounded(x_rounded) ||^2

as the norms behind the block show the difference (seen_error.py; recipe paper: as it is), with the input from the
already rounded prefix and the target from the float prefix; Adam, cosine decay to 0, a straight-through gradient for
rounding. What is kept is the best of the learned, the starting and the nearest codes on calibration windows that no
step has seen (recipe paper, and fewer than 8 windows: on the first few).

Where adapters stand beside the weights (`rotate` nodes), every window belongs to the base or to one of them, and runs
with its vectors through all blocks; a step therefore sees a drawn few of them, and one integer base serves them all.
Likewise every window begins with one of the soft prompts that stand beside the embeddings, or with none.

Where activations are rounded (`round_rows` nodes), or keys and values (`round_heads`), the rounded block rounds them in
every forward pass, with a straight-through gradient, and the float block does not: what is learned makes up for all
roundings.

Where several processes share the work, each has its share of the windows and of both streams (share.py), computes its
part of every batch, and adds up gradients with the others; all take the same steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tpvc.compiler.freed import give_back
from tpvc.compiler.program import Grid, Grids, Program, QTensor, grid_for, linears
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.quick import ops_for
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning.parallel import ALONE, Ranks, SharedStore
from tpvc.passes.block import AT_ONCE, Block, behind_prompts, embedded, spread, unrounded
from tpvc.passes.checks import check_finite, check_float, check_grid, linear_record
from tpvc.passes.factors import Factors
from tpvc.passes.grid import Range, min_max, on_grid
from tpvc.passes.grid_search import search
from tpvc.passes.seen_error import Seen, as_it_is, relative_error, seen_behind
from tpvc.passes.share import Share


@dataclass(frozen=True)
class Recipe:
    """How much work a block gets.

    steps      optimiser steps per block
    batch      calibration windows per step
    lr         Adam's rate for log S2 and log s3
    lr_scale   Adam's rate for log s1
    searched   start from the importance-weighted search instead of min/max
    held_out   windows kept from the optimiser to choose what is kept
    seen       errors count as the norms of the next blocks show them (seen_error.py), not as they are
    rounds     how often the closing step (tune_scales.py) sees every window; 0: there is none
    lr_rounds  its rate
    rank       of log S2 as a share of a weight's shorter side (LRQ); 0: S2 has the weight's shape
    """

    steps: int
    batch: int
    lr: float
    lr_scale: float
    searched: bool
    held_out: int
    seen: bool
    rounds: float
    lr_rounds: float
    rank: float = 0


RECIPES: dict[str, Recipe] = {
    "fast": Recipe(20, 4, lr=1.5e-2, lr_scale=5e-3, searched=True, held_out=8, seen=True, rounds=0, lr_rounds=0.0),
    "default": Recipe(
        120, 4, lr=1.5e-2, lr_scale=5e-3, searched=True, held_out=8, seen=True, rounds=0.75, lr_rounds=7e-4
    ),
    "best": Recipe(400, 4, lr=1e-2, lr_scale=3e-3, searched=True, held_out=8, seen=True, rounds=1.5, lr_rounds=7e-4),
    "lrq": Recipe(
        240, 4, lr=1.5e-2, lr_scale=5e-3, searched=True, held_out=8, seen=True, rounds=1.5, lr_rounds=7e-4, rank=0.25
    ),
    "paper": Recipe(5000, 2, lr=5e-4, lr_scale=5e-4, searched=False, held_out=0, seen=False, rounds=0, lr_rounds=0.0),
}
"""fast, default and best by measurement (docs/flexround.md); paper: the authors' released Llama-2 setting."""


IMPORTANCE_WINDOWS = 32
"""Windows, of those that the optimiser sees, over which the importance of input features is averaged."""


def held_out(recipe: Recipe, windows: int) -> int:
    """How many of so many windows, the last ones, are kept from the optimiser: an eighth at most."""
    return min(recipe.held_out, windows // 8)


def most_processes(recipe: Recipe, windows: int) -> int:
    """How many can share so many windows: each has a part of every batch, and of what importance is found on."""
    training = windows - held_out(recipe, windows)
    return min(recipe.batch, training, -(-min(IMPORTANCE_WINDOWS, training) // AT_ONCE))


@dataclass(frozen=True)
class FlexRound:
    """The pass. Returns the Program with integer weights in every block; records of each block lie in `store`.

    grid         of all block linears, or of each
    windows      int64 [n, L] calibration tokens
    scale_dtype  dtype the scales are stored in; they are exact in it
    ranks        the processes that share the windows
    norms        the same model before factors moved out of its norms, which then do not tell how large features are;
                 None: the one that is rounded
    A finished block found in `store` is taken as it is, so an interrupted run goes on where it stopped.
    """

    grid: Grids
    recipe: Recipe
    windows: Tensor
    store: BlockStore | SharedStore
    seed: int = 0
    scale_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    progress: Progress = silent
    ranks: Ranks = ALONE
    norms: Program | None = None

    @property
    def share(self) -> Share:
        return Share(self.ranks, len(self.windows))

    def __call__(self, program: Program) -> Program:
        nodes = tuple(n for n in program.nodes if n.block is not None)
        check_grid(self.grid, program, nodes)
        check_float(program, nodes)
        finished = 0
        while finished < program.blocks and (found := self.store.finished(finished)) is not None:
            program = program.with_params(found[0])
            finished += 1
        if finished == program.blocks:
            return program
        ids = spread(len(self.windows), len(program.adapters))
        if finished:
            streams = self.store.streams(finished - 1)
            exact, rounded = streams["exact"], streams["rounded"]
        else:
            own = self.share.own
            exact = rounded = embedded(program, behind_prompts(self.windows, program)[own], ids[own])
        for index in range(finished, program.blocks):
            self.progress("FlexRound", index, program.blocks, f"block {index}")
            give_back()
            began = time.perf_counter()
            fit = self._fit(program, index, exact, rounded, ids)
            exact, rounded = fit.exact, fit.rounded
            record = {**fit.record, "seconds": time.perf_counter() - began}
            params = self.store.save(index, fit.params, record, {"exact": exact, "rounded": rounded})
            program = program.with_params(params)
            note = f"block {index}: error {record['error_rtn']:.2e} to {record['error']:.2e}"
            self.progress("FlexRound", index + 1, program.blocks, note)
        return program

    @torch.no_grad()
    def _fit(self, program: Program, index: int, exact: Tensor, rounded: Tensor, ids: Tensor) -> Fit:
        """Learn the rounding of one block and move both streams, of which this process has its share, through it: they
        are overwritten, where the first block does not have one for both."""
        dtype, share, own = self.scale_dtype, self.share, ids[self.share.own]
        block = Block(program, index, self.device)
        nodes = linears(block.nodes)
        weights = {n.params["weight"]: block.weights[n.params["weight"]] for n in nodes}
        grid = {name: grid_for(self.grid, name) for name in weights}
        ops = ops_for(g.bits for g in grid.values())
        target = block.outputs(exact, block.weights, own, unrounded(ops), into=None if exact is rounded else exact)
        check_finite(program, f"block {index}", target, own)

        start = {name: min_max(w, grid[name], dtype) for name, w in weights.items()}
        nearest = {n: on_grid(w, start[n], grid[n], dtype) for n, w in weights.items()}
        if self.recipe.searched:
            first = min(max(IMPORTANCE_WINDOWS, len(program.adapters) + 1), self._training)
            few = slice(0, share.among(first))
            importance = block.importance(rounded[few], own[few], first, self.ranks)
            start = {name: search(w, importance[name], grid[name], dtype) for name, w in weights.items()}
        seen = self.seen(program, index)
        factors = {n: self.factors(w, start[n], grid[n], index) for n, w in weights.items()}
        candidates = {
            "nearest": nearest,
            "searched": {n: on_grid(w, start[n], grid[n], dtype) for n, w in weights.items()},
        }
        give_back()
        curve = self.learn(block, factors, rounded, target, ids, index, seen)
        give_back()
        candidates["learned"] = {n: f.frozen(grid[n], dtype) for n, f in factors.items()}

        judged = range(self._training, len(ids)) if self._training < len(ids) else range(min(AT_ONCE, len(ids)))
        x, wanted = share.rows(rounded, judged), share.rows(target, judged)

        def error(chosen: dict[str, QTensor]) -> float:
            output = block.outputs(x, block.with_rounded(chosen), ids[judged.start : judged.stop], ops)
            return relative_error(output, wanted, seen)

        found = self.ranks.each([partial(error, chosen) for chosen in candidates.values()])
        errors = dict(zip(candidates, found, strict=True))
        kept = min(errors, key=lambda kind: errors[kind])
        params = candidates[kept]
        record = {
            "block": index,
            "error_rtn": errors["nearest"],
            "error_start": errors["searched"],
            "error": errors[kept],
            "kept": kept,
            "steps": self.recipe.steps,
            "curve": curve,
            "linears": [linear_record(n, params[n.params["weight"]], weights[n.params["weight"]]) for n in nodes],
        }
        rounded = block.outputs(rounded, block.with_rounded(params), own, ops, into=rounded)
        return Fit(params, record, target, rounded)

    def seen(self, program: Program, index: int) -> Seen:
        """How errors of block `index` count."""
        return seen_behind(self.norms or program, index) if self.recipe.seen else as_it_is

    @property
    def _training(self) -> int:
        """How many windows, from the first, the optimiser may see."""
        return len(self.windows) - held_out(self.recipe, len(self.windows))

    def factors(self, weight: Tensor, span: Range, grid: Grid, index: int) -> Factors:
        """Where learning starts for a weight [out, in] of block `index`."""
        return Factors.start(weight, span, grid, self.recipe.rank, self._seed(index))

    def _seed(self, index: int) -> int:
        return self.seed * 1_000_003 + index

    @torch.enable_grad()
    def learn(
        self,
        block: Block,
        factors: dict[str, Factors],
        rounded: Tensor,
        target: Tensor,
        ids: Tensor,
        index: int,
        seen: Seen,
    ) -> list:
        """Run the optimiser; returns [[step, loss], ...], the loss relative to the target's mean square, both as seen.

        rounded, target  this process's share of what enters the rounded block and leaves the float one
        ids              of all windows
        seen             how errors count, and the target (seen_error.py)
        """
        recipe, share = self.recipe, self.share
        bits = {name: grid_for(self.grid, name).bits for name in factors}
        if recipe.steps == 0:
            return []
        groups = [
            {"params": [p for f in factors.values() for p in (*f.s2, f.log_s3)], "lr": recipe.lr},
            {"params": [f.log_scale for f in factors.values()], "lr": recipe.lr_scale},
        ]
        optimizer = torch.optim.Adam(groups, eps=1e-12, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
        draw = torch.Generator().manual_seed(self._seed(index))
        training = self._training
        own = share.among(training)
        power = self.ranks.summed(sum(float(seen(t, t).square().sum()) for t in target[:own].split(AT_ONCE)))
        power = power / (training * target[0].numel()) or 1.0  # 0: the norms show nothing of it
        order: list[int] = []
        curve = []
        ops = ops_for(bits.values())
        for step in range(recipe.steps):
            if len(order) < recipe.batch:
                order = torch.randperm(training, generator=draw).tolist()
            batch, order = order[: recipe.batch], order[recipe.batch :]
            weights = {n: f.rounded(2 ** bits[n] - 1, self.scale_dtype) for n, f in factors.items()}
            mine = self.ranks.own(batch)
            x, wanted = (self.ranks.own(share.rows(stream, batch)) for stream in (rounded, target))
            wanted = wanted.to(self.device)
            error = block.output(x, {**block.weights, **weights}, ids[mine], ops=ops) - wanted
            loss = seen(error, wanted).square().mean() / power * (len(mine) / len(batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.ranks.whole(loss, (p for group in groups for p in group["params"]))
            optimizer.step()
            schedule.step()
            if step % max(1, recipe.steps // 20) == 0 or step == recipe.steps - 1:
                curve.append([step, float(f"{loss.item():.6g}")])
        return curve


@dataclass(frozen=True, eq=False)
class Fit:
    """What a block leaves: its integers, what to report, and both streams after it."""

    params: dict[str, QTensor]
    record: dict
    exact: Tensor
    rounded: Tensor
