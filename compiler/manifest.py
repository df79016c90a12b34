"""tpvc.json of a quantised checkpoint: what was read, what was done to it, what came out."""

from __future__ import annotations

import math
from typing import Any

import tpvc
from tpvc.compiler.calibration import Calibration
from tpvc.compiler.identity import versions
from tpvc.compiler.program import Node, Program, described, grid_of, linears
from tpvc.compiler.tuning.parallel import SharedStore
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.ease_inputs import EaseInputs, recorded
from tpvc.passes.fold_road import FoldRoad
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.round_cache import RoundCache
from tpvc.passes.tune_scales import TuneScales


def manifest_of(
    program: Program,
    rounded: Program,
    store: SharedStore,
    options: dict[str, Any],
    calibration: Calibration | None,
    passes: list[Any],
) -> tuple[dict[str, Any], list[float]]:
    """(tpvc.json without anything that differs between two runs of one command, seconds per block)."""
    records = [{**store.finished(i)[1], **recorded(rounded, i)} for i in range(program.blocks)]
    timings = [r.pop("seconds", 0.0) for r in records]
    head = linears(program.epilogue)[-1]
    head_grid = grid_of(rounded.params[head.params["weight"]])
    matrices = {n.params["weight"] for n in linears(rounded.nodes)}
    tables = [n for n in rounded.nodes if n.op == "embed" and n.params["weight"] not in matrices]
    kept = [n for n in (*tables, *linears(rounded.nodes)) if grid_of(rounded.params[n.params["weight"]]) is None]
    record = {
        "tpvc": tpvc.__version__,
        "artefact": "checkpoint",
        "source": program.source.record,
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
    return record, timings


def _pass_record(done: Any) -> dict[str, Any]:
    record = {"name": type(done).__name__}
    if isinstance(done, RoundActivations | RoundCache):
        return {**record, "kind": done.kind}
    if isinstance(done, BankPrompt):
        return {**record, "prompts": [p.name for p in done.prompts]}
    if isinstance(done, BankRoad):
        return {**record, "adapters": [a.name for a in done.roads]}
    if isinstance(done, TuneScales):
        stopped = done.stopped()
        return {**record, "checks": done.checks(), **({} if stopped is None else {"stopped": stopped})}
    return record if isinstance(done, FoldRoad | EaseInputs) else {**record, "grid": described(done.grid)}


def _why_float(program: Program, node: Node) -> str:
    if node.op == "embed":
        return "an untied embedding is a table lookup: rounding it saves bytes but no time; kept in float"
    if node.name in {n.name for n in program.prologue}:
        return "it stands before the first block"
    return "what follows the last block was kept in float (--head-bits 16)"
