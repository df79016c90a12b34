"""What a run of `quantize` is to do: its options for one model, checked before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tpvc.compiler import frontends
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.road import Road
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, Program, linears, scale_dtype_of
from tpvc.compiler.tuning.parallel import processes
from tpvc.compiler.verify import verify
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.checks import check_float, check_grid
from tpvc.passes.ease_inputs import EASED, windows_seen
from tpvc.passes.flexround import RECIPES, Recipe, held_out, most_processes
from tpvc.passes.fold_road import FoldRoad
from tpvc.passes.round_activations import FP8_BITS, RoundActivations, check_kind
from tpvc.passes.round_cache import RoundCache, check_cache
from tpvc.passes.spend_bits import WIDTHS, Fused, average, check_budget, fused

Adapting = RoundActivations | RoundCache | BankPrompt | BankRoad | FoldRoad


@dataclass(frozen=True, eq=False)
class Job:
    """What a run of `quantize` is to do, checked; no weight was read for it.

    source          the model
    program         the same with what is deployed beside its weights: `source` under the passes `adapting`
    roads, prompts  what those passes brought
    method          "flexround" or "rtn"
    nsamples        calibration windows that are looked at
    grid            of the block linears; with avg_bits its bits are the largest width that they pay for everywhere
    fused           with avg_bits: the groups that bits are chosen for, without damages
    head_bits       of the head; 16: it stays in float
    eased           whether EaseInputs is among the passes
    """

    source: Program
    program: Program
    adapting: tuple[Adapting, ...]
    roads: tuple[Road, ...]
    prompts: tuple[Prompt, ...]
    grid: Grid
    method: str
    recipe: Recipe
    nsamples: int
    seqlen: int
    head_bits: int
    avg_bits: float | None
    fused: tuple[Fused, ...]
    eased: bool


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
    _check_options(bits, method, recipe, steps, head_bits, nsamples, seqlen)
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
        _check_windows(program, nsamples, seqlen, chosen if method == "flexround" else None)
    return Job(
        source=source,
        program=program,
        adapting=tuple(adapting),
        roads=adapters,
        prompts=tasks,
        grid=grid,
        method=method,
        recipe=chosen,
        nsamples=nsamples,
        seqlen=seqlen,
        head_bits=head_bits,
        avg_bits=avg_bits,
        fused=groups,
        eased=activations in EASED,
    )


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
    return scale_dtype_of(program.params[linears(program.nodes)[0].params["weight"]])


def _check_options(
    bits: int, method: str, recipe: str, steps: int | None, head_bits: int, nsamples: int, seqlen: int | None
) -> None:
    if not 2 <= bits <= 8:
        raise TpvcError(f"bits is {bits}; expected a width from 2 to 8")
    if method not in ("flexround", "rtn"):
        raise TpvcError(f"method is '{method}'; expected flexround or rtn")
    if recipe not in RECIPES:
        raise TpvcError(f"recipe is '{recipe}'; expected one of {', '.join(RECIPES)}")
    if steps is not None and steps < 0:
        raise TpvcError(f"found {steps} steps a block; expected 0 (nothing is learned) or more")
    if head_bits not in (2, 3, 4, 5, 6, 7, 8, 16):
        raise TpvcError(f"head bits is {head_bits}; expected 16 (keep the head in float) or a width from 2 to 8")
    if nsamples < 1 or (seqlen is not None and seqlen < 2):
        raise TpvcError(f"calibration is {nsamples} windows of {seqlen} tokens; expected at least 1 window of 2 tokens")


def check_processes(method: str, recipe: Recipe, nsamples: int) -> None:
    """Every process that torchrun started must have a share of the work."""
    count = processes()
    if count > 1 and method == "rtn":
        raise TpvcError(f"found {count} processes and method rtn, which is nothing to share; start it without torchrun")
    if count > 1 and count > (most := most_processes(recipe, nsamples)):
        raise TpvcError(
            f"found {count} processes for {nsamples} calibration windows and steps of {recipe.batch} of them;"
            f" start at most {most}" + (", or ask for more windows" if most < recipe.batch else "")
        )


def _check_windows(program: Program, nsamples: int, seqlen: int, learning: Recipe | None) -> None:
    """Calibration windows must go round the adapters and prompts, also those that are learned from, and leave room for
    text behind the prompts."""

    def used(windows: int) -> int:
        return windows - held_out(learning, windows) if learning else windows

    combinations = (len(program.adapters) + 1) * (len(program.prompts) + 1)
    if used(nsamples) < combinations:
        held = nsamples - used(nsamples)
        enough = next(n for n in range(combinations, 2 * combinations) if used(n) >= combinations)
        raise TpvcError(
            f"{nsamples} calibration windows{f', {held} of them held out,' if held else ''} do not go round the base,"
            f" {len(program.adapters)} adapters and {len(program.prompts)} prompts; ask for at least {enough}"
        )
    longest = max((p.tokens for p in program.prompts), default=0)
    if longest and seqlen < 2 * longest:
        raise TpvcError(
            f"calibration windows of {seqlen} tokens are too short behind a prompt of {longest} virtual tokens;"
            f" expected at least {2 * longest}, set --seqlen"
        )
