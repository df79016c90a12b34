"""The Program that `quantize` will leave: shapes, grids and dtypes of its integers, which nobody has made yet."""

from __future__ import annotations

from dataclasses import replace

from tpvc.compiler.job import Job, scale_dtype
from tpvc.compiler.plan.imagined import imagine, without_weights
from tpvc.compiler.program import Grid, Grids, Lazy, Program, grid_for, linears
from tpvc.passes.spend_bits import grids, spend


def outcome(job: Job) -> Program:
    """Its parameters can be read where tensors are imagined."""
    stored = without_weights(job.source).params
    kept = {name: stored.get(name, value) for name, value in job.program.params.items()}
    dtype = scale_dtype(job.source)

    def rounded(name: str, grid: Grid) -> Lazy:
        return imagine(replace(stored[name], dtype=dtype), grid)

    own = imagined_grids(job)
    inside = linears(n for n in job.program.nodes if n.block is not None)
    made = {n.params["weight"]: rounded(n.params["weight"], grid_for(own, n.params["weight"])) for n in inside}
    if job.head_bits != 16:
        head = Grid(job.head_bits, -1, True)
        made |= {n.params["weight"]: rounded(n.params["weight"], head) for n in linears(job.program.epilogue)}
    return replace(job.program, params={**kept, **made})


def imagined_grids(job: Job) -> Grids:
    """The grids of the block linears. Where bits are to be measured, damages are made up, further apart from group to
    group than any that were met: the average is that of the run, and every width is taken that can be."""
    if job.avg_bits is None:
        return job.grid
    apart = min(0.9, 8 / max(1, len(job.fused) - 1))  # below 1: 3 bits come to the next group before 4 come to this one
    groups = []
    for i, g in enumerate(job.fused):
        damages = {b: g.numbers * 4.0 ** (apart * i - b) for b in g.costs}
        groups.append(replace(g, damages=damages))
    return grids(groups, spend(groups, job.avg_bits), job.grid)
