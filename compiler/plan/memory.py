"""What `quantize` will hold at most: the passes themselves, run on tensors without memory.

Counted are the reading of every weight, sampling where text is to be written by the model, two blocks with their
streams (all blocks are alike, and the first has one stream for two), and the head. What a process holds before it
computes anything (interpreter, libraries, tokenizer) is measured (`probe.py`) and added, as is a GGUF file, which stays
mapped.
Writing the artefact takes a matrix at a time, less than rounding it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from tpvc.compiler.compressed_tensors_format import Form, entries
from tpvc.compiler.interpret import from_files, in_memory, logits
from tpvc.compiler.job import Job, scale_dtype
from tpvc.compiler.plan.imagined import Counter, imagine, imagined, without_weights
from tpvc.compiler.program import Grid, Lazy, Program, QTensor, linears, read
from tpvc.compiler.sample import HELD, batch_size
from tpvc.passes.ease_inputs import EaseInputs, eased, kept
from tpvc.passes.flexround import FlexRound, held_out
from tpvc.passes.measure_damage import MeasureDamage, length
from tpvc.passes.round_to_nearest import RoundToNearest
from tpvc.passes.sensitivity import looked_at
from tpvc.passes.tune_scales import TuneScales

BLOCKS = 2


@dataclass(frozen=True)
class Peak:
    """Bytes beyond what a process holds anyway, in host memory and on a device."""

    host: int
    device: int


class Nowhere:
    """A store of blocks that keeps nothing but shapes: as `BlockStore` where no run was before."""

    def __init__(self) -> None:
        self.shapes: dict[str, torch.Size] = {}

    def finished(self, block: int) -> None:
        return None

    def streams(self, block: int, *names: str) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(self.shapes[name]) for name in names or self.shapes}

    def save(self, index: int, params: Mapping[str, QTensor], record: dict, streams: dict | None) -> dict[str, Lazy]:
        """Makes what a block's file is written from."""
        self.shapes = {name: t.shape for name, t in (streams or {}).items()}
        for q in params.values():
            _ = [torch.empty(s, dtype=d) for d, s in entries(q.shape, q.grid, q.scale_dtype, Form()).values()]
        return {name: imagine(Lazy(q.shape, q.scale_dtype, q.dequantize, q.grid)) for name, q in params.items()}


def quantising(job: Job, sampled: int, seed: int = 0, device: str = "cpu") -> Peak:
    """The most that a run holds; sampled: windows that the model writes itself."""
    with imagined() as counter, torch.no_grad():
        program = without_weights(job.source)
        for rewrite in job.adapting:
            program = rewrite(program)
        for parameter in program.params.values():
            read(parameter)
        if sampled:
            _sample(program, sampled, job.seqlen)
        _round(program, job, seed, device)
        return _peak(counter)


def _peak(counter: Counter) -> Peak:
    return Peak(counter.host.peak, counter.device.peak)


def _round(program: Program, job: Job, seed: int, device: str) -> None:
    dtype, store, few, nsamples = scale_dtype(job.source), Nowhere(), cut(program), job.nsamples
    if job.avg_bits is not None:
        _measure(few, program.blocks - few.blocks, job, seed, device)
    if job.eased:
        few = _ease(few, program.blocks - few.blocks, job, seed, device)
    if job.method == "flexround":
        nsamples = max(2, nsamples)  # every number that is asked for is 1, and so is the window that a step draws
        windows = torch.zeros(nsamples, job.seqlen, dtype=torch.int64)
        recipe = replace(job.recipe, steps=min(2, job.recipe.steps))  # the second one has the state of the first
        rounded = FlexRound(job.grid, recipe, windows, store, seed, dtype, device)(few)
        if recipe.rounds:
            more = program.blocks - few.blocks
            each = _closing(few, job.grid, job.seqlen * recipe.batch)
            _others = [torch.empty(each, dtype=torch.uint8, device=device) for _ in range(more)]
            held = held_out(recipe, nsamples)
            rounds = 2 * recipe.batch / (nsamples - held)
            how = rounds, recipe.batch, recipe.lr_rounds, held
            TuneScales(*how, windows, store, Nowhere(), seed, device)(rounded)
    else:
        RoundToNearest(job.grid, store, scale_dtype=dtype)(few)
    if job.head_bits != 16:
        RoundToNearest(Grid(job.head_bits, -1, True), store, "epilogue", dtype)(few)


def _measure(program: Program, more: int, job: Job, seed: int, device: str) -> None:
    """What widths cost, with what enters as many more blocks."""
    windows = torch.zeros(job.nsamples, job.seqlen, dtype=torch.int64)
    searched, store = job.method == "flexround" and job.recipe.searched, Nowhere()
    seen = min(job.nsamples, looked_at(program)), min(job.seqlen, length(program)), program.facts.hidden_size
    _others = [torch.empty(seen) for _ in range(more)]
    groups = [g for g in job.fused if g.block < program.blocks]
    MeasureDamage(job.grid, searched, windows, store, seed, scale_dtype(job.source), device).measure(
        program, groups, program.blocks
    )


def _ease(program: Program, more: int, job: Job, seed: int, device: str) -> Program:
    """Factors and grids of activations, with what enters as many more blocks or the gradients at their ends."""
    windows = torch.zeros(job.nsamples, job.seqlen, dtype=torch.int64)
    shape = min(job.nsamples, looked_at(program)), job.seqlen, program.facts.hidden_size
    _others = [torch.empty(shape) for _ in range(more)]
    ease = EaseInputs(windows, job.grid, Nowhere(), scale_dtype(job.source), seed, device)
    return eased(program, *kept(program, ease.choices(program)))


def _closing(program: Program, grid: Grid, tokens: int) -> int:
    """Bytes that one more block adds to the closing step: its codes; for every scale itself, its zero point, its factor
    and that one's gradient, moments and best; what enters it, for a batch of so many tokens."""
    total = 4 * tokens * program.facts.hidden_size
    for node in linears(program.block(0)):
        rows, columns = program.params[node.params["weight"]].shape
        total += rows * columns + (25 * rows * columns // grid.columns(columns) if grid.group else 25)
    return total


def cut(program: Program, blocks: int = BLOCKS) -> Program:
    """The program with its first blocks alone."""
    return replace(program, nodes=tuple(n for n in program.nodes if n.block is None or n.block < blocks))


def _sample(program: Program, windows: int, seqlen: int) -> None:
    """The last token of a batch of windows, which has the longest cache."""
    small = sum(4 * torch.Size(p.shape).numel() for p in program.params.values()) <= HELD
    weight = in_memory(program) if small else from_files(program)
    facts, rows = program.facts, min(windows, batch_size(program, seqlen))
    shape = (rows, facts.kv_heads, seqlen - 1, facts.head_dim)
    layers = [n.name for n in program.nodes if n.op == "attention"]
    cache = {name: (torch.empty(shape), torch.empty(shape)) for name in layers}
    logits(program, torch.zeros(rows, 1, dtype=torch.int64), weight=weight, cache=cache)[:, -1].softmax(-1)
