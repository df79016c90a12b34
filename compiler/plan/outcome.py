"""The Program that `quantize` will leave: shapes, grids and dtypes of its integers, which nobody has made yet."""

from __future__ import annotations

from dataclasses import replace

from tpvc.compiler.pipeline import Job, scale_dtype
from tpvc.compiler.plan.imagined import imagine, without_weights
from tpvc.compiler.program import Grid, Lazy, Program, linears


def outcome(job: Job, head_bits: int) -> Program:
    """Its parameters can be read where tensors are imagined."""
    stored = without_weights(job.source).params
    kept = {name: stored.get(name, value) for name, value in job.program.params.items()}
    dtype = scale_dtype(job.source)

    def rounded(name: str, grid: Grid) -> Lazy:
        return imagine(replace(stored[name], dtype=dtype), grid)

    inside = linears(n for n in job.program.nodes if n.block is not None)
    made = {n.params["weight"]: rounded(n.params["weight"], job.grid) for n in inside}
    if head_bits != 16:
        head = Grid(head_bits, -1, True)
        made |= {n.params["weight"]: rounded(n.params["weight"], head) for n in linears(job.program.epilogue)}
    return replace(job.program, params={**kept, **made})
