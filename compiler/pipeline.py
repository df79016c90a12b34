"""The way through the house: checkpoint -> Program -> passes -> Program -> artefact. Read `quantize`; from
the artefact on, `export_pipeline.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tpvc.compiler import frontends, report
from tpvc.compiler.backends import huggingface
from tpvc.compiler.calibration import Calibration, calibrate
from tpvc.compiler.identity import run_identity
from tpvc.compiler.job import Job, calibrated, check_processes, prepare, scale_dtype
from tpvc.compiler.manifest import manifest_of
from tpvc.compiler.output import ARTEFACT, BLOCKS, MANIFEST, check_apart, check_free, published
from tpvc.compiler.program import Grid, Grids, Program, grid_of, read
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.tuning.parallel import Ranks, SharedStore, ranks
from tpvc.compiler.verify import verify
from tpvc.passes.ease_inputs import EaseInputs
from tpvc.passes.flexround import FlexRound, held_out
from tpvc.passes.measure_damage import MeasureDamage
from tpvc.passes.round_to_nearest import RoundToNearest
from tpvc.passes.spend_bits import average, grids, spend
from tpvc.passes.store_dtypes import store_dtypes
from tpvc.passes.tune_scales import TuneScales


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    avg_bits: float | None = None,
    group: int | None = None,
    symmetric: bool = False,
    activations: str | None = None,
    cache: str | None = None,
    method: str = "flexround",
    recipe: str = "default",
    steps: int | None = None,
    dataset: str = "builtin",
    nsamples: int = 128,
    seqlen: int | None = None,
    head_bits: int = 8,
    roads: Mapping[str, str | Path] | None = None,
    fold: bool = False,
    prompts: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Quantise `model` block by block into the directory `out`, a checkpoint that transformers loads as it stands.

    bits, group, symmetric  the grid of the block linears: 2..8 (None: 4); columns per scale, -1 per channel, 0 per
                            tensor, None: the largest of 128, 64, 32 that divides every weight, and -1 for W8A8
    avg_bits                in place of bits: 2, 3, 4 or 8 for each group of linears that read one value, so that codes,
                            scales and zero points of the block linears take so many bits a weight at most, where it
                            costs least, as measured on calibration text
    activations             "int8" or "fp8": what block linears read is rounded per token, while the model runs (W8A8,
                            W4A8); "int8-static": on one grid for all tokens, found on the calibration text, and per
                            token where none is good enough; None: in float. Before int8, factors are moved into the
                            weights that make it easy to round, as measured on calibration text
    cache                   "int8": keys and values are rounded as a cache of 8 bits keeps them, every head of a token
                            with a scale of its own; None: they stay in float
    method                  "flexround", or "rtn" for round-to-nearest, which needs no calibration by itself
    recipe, steps           a name in RECIPES; steps overrides its optimiser steps per block
    dataset, nsamples, seqlen   calibration: see tpvc.compiler.calibration; seqlen None: 256, or the model's context
    head_bits               8 rounds the head per channel (to nearest); 16 leaves it in float
    roads, fold             {name: PEFT directory} of RoAd adapters to be deployed: rounding is learned under them, and
                            they travel beside the integers, chosen by name or row; or one, folded in before rounding
    prompts                 {task: PEFT directory} of soft prompts to be deployed: calibration windows begin with them,
                            and they travel beside the integers

    An interrupted run leaves `OUT.partial`; the same call goes on after its last finished block. Processes that
    torchrun started share the calibration windows of flexround; process 0 writes.
    """
    out = Path(out)
    for given in (model, dataset, *(roads or {}).values(), *(prompts or {}).values()):
        check_apart(out, given)
    check_free(out, overwrite)
    progress("load", 0, 1, str(model))
    job = prepare(
        model,
        bits=bits,
        avg_bits=avg_bits,
        group=group,
        symmetric=symmetric,
        activations=activations,
        cache=cache,
        method=method,
        recipe=recipe,
        steps=steps,
        nsamples=nsamples,
        seqlen=seqlen,
        head_bits=head_bits,
        roads=roads,
        fold=fold,
        prompts=prompts,
    )
    source, program, grid, chosen = job.source, job.program, job.grid, job.recipe
    nsamples, seqlen = job.nsamples, job.seqlen
    check_processes(method, chosen, nsamples)
    tokenizer = frontends.tokenizer(program)
    progress("load", 1, 1, "")

    calibration = None
    if calibrated(method, activations, avg_bits):
        calibration = calibrate(program, tokenizer, dataset, nsamples, seqlen, seed, progress=progress)
    options = {
        **({"bits": grid.bits} if avg_bits is None else {"avg_bits": avg_bits}),
        "group": grid.group,
        "symmetric": symmetric,
        "method": method,
        "head_bits": head_bits,
        "scale_dtype": str(scale_dtype(source)).removeprefix("torch."),
    }
    if activations:
        options |= {"activations": activations}
    if cache:
        options |= {"cache": cache}
    if job.roads:
        options |= {"roads": {a.name: a.origin["sha256"] for a in job.roads}, "fold": fold}
    if job.prompts:
        options |= {"prompts": {p.name: p.origin["sha256"] for p in job.prompts}}
    if method == "flexround":
        options |= {"recipe": recipe, **asdict(chosen)}
    if calibration is not None:
        options |= {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "seed": seed, "device": device}

    with ranks(device) as own, own.published(out, published(out, overwrite, resumable=True)) as work:
        progress = own.told(progress)
        if calibration is not None:  # process 0's for all, whatever they would have sampled
            tokens = own.dealt(own.own(calibration.tokens[None]), 1)[0]
            calibration = replace(calibration, tokens=tokens)
        identity = {**_fingerprint(job, options, calibration), "processes": own.count}
        store = own.store(work / BLOCKS, identity, replace=overwrite, divided=True)
        easing, measured, closing = (own.store(work / BLOCKS / n, identity, replace=True) for n in BESIDE)
        if own.rank == 0 and store.finished(0) is None:
            _check_finite(program, progress)
        chosen_bits = None
        if avg_bits is not None:
            grid, chosen_bits = _choose_bits(job, calibration, measured, seed, device, progress)
        stores = Stores(easing, store, closing)
        passes = _passes(job, grid, calibration, stores, seed, device, progress, own)
        rounded = program
        for rounding in passes:
            rounded = verify(rounding(rounded), after=type(rounding).__name__)
        if own.rank:
            return out  # process 0 writes
        rounded = store_dtypes(rounded, source)
        manifest, timings = manifest_of(source, rounded, store, options, calibration, [*job.adapting, *passes])
        if chosen_bits is not None:
            manifest["chosen_bits"] = chosen_bits
        if eased := easing.finished(0):
            manifest["divided"] = eased[1]["divided"]
        progress("write", 0, 1, str(out))
        huggingface.emit(rounded, work / ARTEFACT, tokenizer, manifest)
        manifest = json.loads((work / ARTEFACT / MANIFEST).read_text(encoding="utf-8"))
        report.write(work / ARTEFACT / "report.html", manifest, timings)
        progress("write", 1, 1, str(out))
    return out


BESIDE = "easing", "measured", "closing"
"""Where, among the finished blocks, these keep their state: what was chosen before int8 activations were rounded, the
blocks on which bits were tried, and the closing step."""

Rounding = FlexRound | RoundToNearest | EaseInputs | TuneScales


def _check_finite(program: Program, progress: Progress) -> None:
    """Read every float parameter once, one at a time: one with NaN or Inf is refused now and not after hours."""
    names = [name for name, parameter in program.params.items() if grid_of(parameter) is None]
    for done, name in enumerate(names):
        progress("check", done, len(names), name)
        read(program.params[name])
    progress("check", len(names), len(names), "")


def _choose_bits(
    job: Job, calibration: Calibration, store: SharedStore, seed: int, device: str, progress: Progress
) -> tuple[dict[str, Grid], dict[str, Any]]:
    """(grid of every block linear by its weight, what the manifest says about the choice)."""
    searched, dtype = job.method == "flexround" and job.recipe.searched, scale_dtype(job.source)
    measure = MeasureDamage(job.grid, searched, calibration.tokens, store, seed, dtype, device, progress)
    groups = measure(job.program, job.fused)
    widths = spend(groups, job.avg_bits)
    return grids(groups, widths, job.grid), {
        "asked": job.avg_bits,
        "taken": average(groups, widths),
        "codes": sum(g.numbers * b for g, b in zip(groups, widths, strict=True)) / sum(g.numbers for g in groups),
        "groups": [
            {"block": g.block, "names": g.names, "bits": b, "damages": {str(k): d for k, d in g.damages.items()}}
            for g, b in zip(groups, widths, strict=True)
        ],
    }


@dataclass(frozen=True)
class Stores:
    """Where the passes keep what they finished: what was chosen before, the blocks, and the closing step's state."""

    easing: SharedStore
    blocks: SharedStore
    closing: SharedStore


def _passes(
    job: Job,
    grid: Grids,
    calibration: Calibration | None,
    stores: Stores,
    seed: int,
    device: str,
    progress: Progress,
    own: Ranks,
) -> list[Rounding]:
    """Order is meaning: what makes activations easy to round first; then the blocks, rounded under them on the float
    embedding, and what is tuned behind them; then the head, which may share its matrix with the embedding."""
    recipe, dtype, blocks = job.recipe, scale_dtype(job.source), stores.blocks
    passes: list[Rounding] = []
    if job.eased:
        passes.append(EaseInputs(calibration.tokens, grid, stores.easing, dtype, seed, device, progress))
    if job.method == "flexround":
        windows, how = calibration.tokens, (device, progress, own)
        passes.append(FlexRound(grid, recipe, windows, blocks, seed, dtype, *how, norms=job.program))
        if recipe.rounds:
            rates = recipe.rounds, recipe.batch, recipe.lr_rounds
            held = held_out(recipe, len(windows))
            passes.append(TuneScales(*rates, held, windows, blocks, stores.closing, seed, *how))
    else:
        passes.append(RoundToNearest(grid, blocks, scale_dtype=dtype, progress=progress))
    if job.head_bits != 16:
        passes.append(RoundToNearest(Grid(job.head_bits, -1, True), blocks, "epilogue", dtype, progress))
    return passes


def _fingerprint(job: Job, options: dict[str, Any], calibration: Calibration | None) -> dict[str, Any]:
    sha = None if calibration is None else calibration.origin["sha256"]
    ordered = {  # which window belongs to which of them goes by their order
        "adapters": [[a.name, *(a.origin[key] for key in ("variant", "group", "sha256"))] for a in job.roads],
        "tasks": [[p.name, p.origin["sha256"]] for p in job.prompts],
    }
    return {**options, **run_identity(job.program), **ordered, "calibration": sha}
