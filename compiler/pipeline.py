"""The way through the house: checkpoint -> Program -> passes -> Program -> artefact. Read `quantize`; from
the artefact on, `export_pipeline.py`."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tpvc
from tpvc.compiler import frontends, report
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.road import Road
from tpvc.compiler.backends import huggingface
from tpvc.compiler.calibration import Calibration, calibrate
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import ARTEFACT, BLOCKS, MANIFEST, check_apart, check_free, published
from tpvc.compiler.program import (
    Grid,
    Grids,
    Node,
    Program,
    described,
    grid_of,
    linears,
    read,
)
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.tuning.parallel import Ranks, SharedStore, processes, ranks
from tpvc.compiler.verify import verify
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.checks import check_float, check_grid
from tpvc.passes.ease_inputs import EASED, EaseInputs, recorded, windows_seen
from tpvc.passes.flexround import RECIPES, FlexRound, Recipe, held_out, most_processes
from tpvc.passes.fold_road import FoldRoad, as_stored
from tpvc.passes.measure_damage import MeasureDamage
from tpvc.passes.round_activations import FP8_BITS, RoundActivations, check_kind
from tpvc.passes.round_cache import RoundCache, check_cache
from tpvc.passes.round_to_nearest import RoundToNearest
from tpvc.passes.spend_bits import WIDTHS, Fused, average, check_budget, fused, grids, spend
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
    _check_processes(method, chosen, nsamples)
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
        identity = {**_fingerprint(program, options, calibration), "processes": own.count}
        store = own.store(work / BLOCKS, identity, replace=overwrite, divided=True)
        closing = own.store(work / BLOCKS / CLOSING, identity, replace=True)
        if own.rank == 0 and store.finished(0) is None:
            _check_finite(program, progress)
        chosen_bits = None
        if avg_bits is not None:
            measured = own.store(work / BLOCKS / MEASURED, identity, replace=True)
            grid, chosen_bits = _choose_bits(job, options, calibration, measured, progress)
        easing = own.store(work / BLOCKS / EASING, identity, replace=True)
        passes = _passes(grid, options, chosen, calibration, store, closing, easing, progress, own)
        rounded = program
        for rounding in passes:
            rounded = verify(rounding(rounded), after=type(rounding).__name__)
        if own.rank:
            return out  # process 0 writes
        rounded = as_stored(rounded, source)
        manifest, timings = _manifest(source, rounded, store, options, calibration, [*job.adapting, *passes])
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


@dataclass(frozen=True, eq=False)
class Job:
    """What a run of `quantize` is to do, checked; no weight was read for it.

    source          the model
    program         the same with what is deployed beside its weights: `source` under the passes `adapting`
    roads, prompts  what those passes brought
    nsamples        calibration windows that are looked at
    grid            of the block linears; with avg_bits its bits are the largest width that they pay for everywhere
    fused           with avg_bits: the groups that bits are chosen for, without damages
    eased           whether EaseInputs is among the passes
    """

    source: Program
    program: Program
    adapting: tuple[Adapting, ...]
    roads: tuple[Road, ...]
    prompts: tuple[Prompt, ...]
    grid: Grid
    recipe: Recipe
    nsamples: int
    seqlen: int
    avg_bits: float | None = None
    fused: tuple[Fused, ...] = ()
    eased: bool = False


def prepare(
    model: str | Path,
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
    nsamples: int = 128,
    seqlen: int | None = None,
    head_bits: int = 8,
    roads: Mapping[str, str | Path] | None = None,
    fold: bool = False,
    prompts: Mapping[str, str | Path] | None = None,
) -> Job:
    """Options of `quantize` and what they mean for `model`. TpvcError for what it would refuse before it starts."""
    if bits is not None and avg_bits is not None:
        raise TpvcError(f"found {bits} bits for every weight and {avg_bits:g} on average; give one of them")
    bits = 4 if bits is None else bits
    _check_options(bits, method, recipe, head_bits, nsamples, seqlen)
    if activations is not None:
        check_kind(activations, bits)
    if cache is not None:
        check_cache(cache)
    if fold and len(roads or {}) != 1:
        raise TpvcError(f"folding takes exactly one adapter, found {len(roads or {})}; name one, or do not fold")
    source = program = frontends.load(model)
    if source.adapters or source.prompts:
        names = ", ".join(a.name for a in (*source.adapters, *source.prompts))
        raise TpvcError(f"{model} carries adapters ({names}); quantise its base, and name them with --road or --prompt")
    adapters = frontends.read_roads(program, roads or {})
    tasks = frontends.read_prompts(program, prompts or {})
    adapting: list[Adapting] = [RoundActivations(activations)] if activations else []
    adapting += [RoundCache(cache)] if cache else []
    adapting += [BankPrompt(tasks)] if tasks else []
    adapting += [BankRoad(adapters)] if adapters else []
    adapting += [FoldRoad()] if fold else []
    for rewrite in adapting:
        program = verify(rewrite(program), after=type(rewrite).__name__)
    if group is None:  # what W8A8 means elsewhere: sums of integers to the end, scaled once
        group = -1 if bits == 8 and activations else default_group(program)
    grid = Grid(bits, group, symmetric)
    nodes = tuple(n for n in program.nodes if n.block is not None)
    check_grid(grid, program, nodes)
    check_float(program, nodes)
    groups: tuple[Fused, ...] = ()
    if avg_bits is not None:
        groups = fused(program, grid, scale_dtype(source), [b for b in WIDTHS if activations != "fp8" or b <= FP8_BITS])
        check_budget(groups, avg_bits)
        everywhere = {b: average(groups, [b] * len(groups)) for b in groups[0].costs}
        grid = replace(grid, bits=max(b for b, cost in everywhere.items() if cost <= avg_bits))
    chosen = RECIPES[recipe] if steps is None else replace(RECIPES[recipe], steps=steps)
    seqlen = min(256, program.facts.context_length) if seqlen is None else seqlen
    if method == "rtn":  # the rest would be for learning
        nsamples = min(nsamples, windows_seen(program))
    if calibrated(method, activations, avg_bits):
        _check_windows(program, nsamples, seqlen)
    eased = activations in EASED
    return Job(
        source, program, tuple(adapting), adapters, tasks, grid, chosen, nsamples, seqlen, avg_bits, groups, eased
    )


CLOSING = "closing"
"""Where, among the finished blocks, the closing step keeps its state."""
EASING = "easing"
"""Likewise what was chosen before int8 activations were rounded."""
MEASURED = "measured"
"""Likewise the blocks on which bits were tried."""

Adapting = RoundActivations | RoundCache | BankPrompt | BankRoad | FoldRoad
Rounding = FlexRound | RoundToNearest | EaseInputs | TuneScales


def calibrated(method: str, activations: str | None, avg_bits: float | None = None) -> bool:
    """Whether a run of `quantize` looks at calibration text."""
    return method == "flexround" or activations in EASED or avg_bits is not None


def default_group(program: Program) -> int:
    """The largest of 128, 64 and 32 that divides every block linear's columns; per channel if none does."""
    nodes = linears(n for n in program.nodes if n.block is not None)
    columns = {program.params[n.params["weight"]].shape[1] for n in nodes}
    return next((g for g in (128, 64, 32) if all(c % g == 0 for c in columns)), -1)


def scale_dtype(program: Program) -> torch.dtype:
    """Scales are stored in the dtype of the checkpoint's own linears, so that readers need not round them again."""
    first = linears(program.nodes)[0].params["weight"]
    return program.params[first].dtype


def _check_options(bits: int, method: str, recipe: str, head_bits: int, nsamples: int, seqlen: int | None) -> None:
    if not 2 <= bits <= 8:
        raise TpvcError(f"bits is {bits}; expected a width from 2 to 8")
    if method not in ("flexround", "rtn"):
        raise TpvcError(f"method is '{method}'; expected flexround or rtn")
    if recipe not in RECIPES:
        raise TpvcError(f"recipe is '{recipe}'; expected one of {', '.join(RECIPES)}")
    if head_bits not in (2, 3, 4, 5, 6, 7, 8, 16):
        raise TpvcError(f"head bits is {head_bits}; expected 16 (keep the head in float) or a width from 2 to 8")
    if nsamples < 1 or (seqlen is not None and seqlen < 2):
        raise TpvcError(f"calibration is {nsamples} windows of {seqlen} tokens; expected at least 1 window of 2 tokens")


def _check_processes(method: str, recipe: Recipe, nsamples: int) -> None:
    """Every process that torchrun started must have a share of the work."""
    count = processes()
    if count > 1 and method == "rtn":
        raise TpvcError(f"found {count} processes and method rtn, which is nothing to share; start it without torchrun")
    if count > 1 and count > (most := most_processes(recipe, nsamples)):
        raise TpvcError(
            f"found {count} processes for {nsamples} calibration windows and steps of {recipe.batch} of them;"
            f" start at most {most}, or ask for more windows"
        )


def _check_windows(program: Program, nsamples: int, seqlen: int) -> None:
    """Calibration windows must go round the adapters and prompts, and leave room for text behind the prompts."""
    combinations = (len(program.adapters) + 1) * (len(program.prompts) + 1)
    if nsamples < combinations:
        raise TpvcError(
            f"{nsamples} calibration windows do not go round the base, {len(program.adapters)} adapters and"
            f" {len(program.prompts)} prompts; ask for at least {combinations}"
        )
    longest = max((p.tokens for p in program.prompts), default=0)
    if longest and seqlen < 2 * longest:
        raise TpvcError(
            f"calibration windows of {seqlen} tokens are too short behind a prompt of {longest} virtual tokens;"
            f" expected at least {2 * longest}, set --seqlen"
        )


def _check_finite(program: Program, progress: Progress) -> None:
    """Read every float parameter once, one at a time: one with NaN or Inf is refused now and not after hours."""
    names = [name for name, parameter in program.params.items() if grid_of(parameter) is None]
    for done, name in enumerate(names):
        progress("check", done, len(names), name)
        read(program.params[name])
    progress("check", len(names), len(names), "")


def _choose_bits(
    job: Job, options: dict[str, Any], calibration: Calibration, store: SharedStore, progress: Progress
) -> tuple[dict[str, Grid], dict[str, Any]]:
    """(grid of every block linear by its weight, what the manifest says about the choice)."""
    searched = options["method"] == "flexround" and job.recipe.searched
    seed, device, dtype = options["seed"], options["device"], getattr(torch, options["scale_dtype"])
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


def _passes(
    grid: Grids,
    options: dict[str, Any],
    recipe: Recipe,
    calibration: Calibration | None,
    store: SharedStore,
    closing: SharedStore,
    easing: SharedStore,
    progress: Progress,
    own: Ranks,
) -> list[Rounding]:
    """Order is meaning: what makes activations easy to round first; then the blocks, rounded under them on the float
    embedding, and what is tuned behind them; then the head, which may share its matrix with the embedding."""
    dtype = getattr(torch, options["scale_dtype"])
    passes: list[Rounding] = []
    if options.get("activations") in EASED:
        how = options["seed"], options["device"]
        passes.append(EaseInputs(calibration.tokens, grid, easing, dtype, *how, progress))
    if options["method"] == "flexround":
        seed, device = options["seed"], options["device"]
        windows = calibration.tokens
        passes.append(FlexRound(grid, recipe, windows, store, seed, dtype, device, progress, own))
        if recipe.rounds:
            held = held_out(recipe, len(windows))
            rates = recipe.rounds, recipe.batch, recipe.lr_rounds
            passes.append(TuneScales(*rates, held, windows, store, closing, seed, device, progress, own))
    else:
        passes.append(RoundToNearest(grid, store, scale_dtype=dtype, progress=progress))
    if options["head_bits"] != 16:
        head = Grid(options["head_bits"], -1, True)
        passes.append(RoundToNearest(head, store, "epilogue", dtype, progress))
    return passes


def _manifest(
    program: Program,
    rounded: Program,
    store: SharedStore,
    options: dict[str, Any],
    calibration: Calibration | None,
    passes: list[Adapting | Rounding],
) -> tuple[dict[str, Any], list[float]]:
    """(tpvc.json without anything that differs between two runs of one command, seconds per block)."""
    records = [{**store.finished(i)[1], **recorded(rounded, i)} for i in range(program.blocks)]
    timings = [r.pop("seconds", 0.0) for r in records]
    head = linears(program.epilogue)[-1]
    head_grid = grid_of(rounded.params[head.params["weight"]])
    matrices = {n.params["weight"] for n in linears(rounded.nodes)}
    tables = [n for n in rounded.nodes if n.op == "embed" and n.params["weight"] not in matrices]
    kept = [n for n in (*tables, *linears(rounded.nodes)) if grid_of(rounded.params[n.params["weight"]]) is None]
    manifest = {
        "tpvc": tpvc.__version__,
        "artefact": "checkpoint",
        "source": {
            "name": program.source.name,
            "files": program.source.files,
            "config": dict(program.source.config),
        },
        "options": options,
        "calibration": None if calibration is None else calibration.origin,
        "passes": [_pass_record(p) for p in passes],
        "adapters": [a.record for a in rounded.adapters],
        "prompts": [p.record for p in rounded.prompts],
        "blocks": records,
        "head": {
            "name": head.name,
            "parameter": head.params["weight"],
            "bits": head_grid.bits if head_grid else 16,
            "tied": any(n.op == "embed" and n.params["weight"] == head.params["weight"] for n in program.nodes),
        },
        "left_in_float": [{"name": n.name, "why": _why_float(program, n)} for n in kept],
        "size": {"float_bytes": sum(math.prod(p.shape) * p.dtype.itemsize for p in program.params.values())},
        "versions": versions("torch", "transformers", "safetensors", "compressed-tensors"),
    }
    return manifest, timings


def _pass_record(done: Adapting | Rounding) -> dict[str, Any]:
    record = {"name": type(done).__name__}
    if isinstance(done, RoundActivations | RoundCache):
        return {**record, "kind": done.kind}
    if isinstance(done, BankPrompt):
        return {**record, "prompts": [p.name for p in done.prompts]}
    if isinstance(done, BankRoad):
        return {**record, "adapters": [a.name for a in done.roads]}
    if isinstance(done, TuneScales):
        return {**record, "checks": done.checks()}
    return record if isinstance(done, FoldRoad | EaseInputs) else {**record, "grid": described(done.grid)}


def _why_float(program: Program, node: Node) -> str:
    if node.op == "embed":
        return "an untied embedding is a table lookup: rounding it saves bytes but no time; kept in float"
    if node in program.prologue:
        return "it stands before the first block"
    return "what follows the last block was kept in float (--head-bits 16)"


def run_identity(program: Program) -> dict[str, Any]:
    """What a resumed run must share with the interrupted one, whatever it does: model, config and torch's version."""
    return {
        "source": program.source.files,
        "config": hashlib.sha256(json.dumps(program.source.config, sort_keys=True).encode()).hexdigest(),
        "versions": versions("torch"),
    }


def _fingerprint(program: Program, options: dict[str, Any], calibration: Calibration | None) -> dict[str, Any]:
    sha = None if calibration is None else calibration.origin["sha256"]
    return {**options, **run_identity(program), "calibration": sha}


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "tpvc": tpvc.__version__}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
