"""What a fine-tuning leaves behind: a checkpoint or an adapter's directory, with tpvc.json and report.html."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tpvc
from tpvc.compiler.adapters import lora_files, road_files
from tpvc.compiler.backends import huggingface
from tpvc.compiler.output import MANIFEST
from tpvc.compiler.program import Program
from tpvc.compiler.sha256 import sha256
from tpvc.compiler.tuning.importance_file import Importance
from tpvc.compiler.tuning.loop import Tuned
from tpvc.compiler.tuning.lora_space import LoraSpace
from tpvc.compiler.tuning.space import Space
from tpvc.compiler.tuning.weight_space import WeightSpace
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.fold_lora import FoldLora
from tpvc.passes.fold_road import FoldRoad
from tpvc.passes.store_dtypes import store_dtypes

ADAPTER = "adapter"
"""The folder beside a merged checkpoint."""


def about(found: Importance, path: str | Path | None) -> dict[str, Any]:
    """What a manifest says of an importance, and of the file that it came from."""
    told = {key: value for key, value in found.about.items() if key != "layers"}
    return told if path is None else {**told, "file": {"name": Path(path).name, "sha256": sha256(Path(path))}}


def ratios(tuned: Tuned, steps: int) -> dict[str, float | None]:
    """Penalty over loss, means over the stretch that holds the middle of the run, and over the last one."""
    middle = next((c for c in tuned.curve if 2 * c[0] >= steps), None)
    last = tuned.curve[-1] if tuned.curve else None
    return {
        key: None if point is None or not point[1] > 0 else point[2] / point[1]
        for key, point in (("middle", middle), ("end", last))
    }


@torch.no_grad()
def drift(space: Space, best: dict[str, Tensor]) -> list[list[float]]:
    """[[block, how far its protected tensors are from the base model, of their own length], ...]. Leaves the space at
    `best`."""
    for name, p in space.params.items():
        p.copy_(best[name])
    squares: dict[int, list[float]] = {}
    for name, block in space.layers.items():
        own = squares.setdefault(block, [0.0, 0.0])
        for i, tensor in enumerate(space.drift(name)):
            own[i] += float(tensor.double().square().sum())
    return [[block, math.sqrt(a / b) if b else 0.0] for block, (a, b) in sorted(squares.items())]


def write(
    space: Space,
    program: Program,
    tokenizer: Any,
    best: dict[str, Tensor],
    directory: Path,
    name: str,
    merge: bool,
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """The result called `name`, and tpvc.json, `manifest` with what was written and what it was made from: returned."""
    checkpoint = {
        **manifest,
        "artefact": "checkpoint",
        "source": program.source.record,
    }
    if isinstance(space, WeightSpace):
        changed = store_dtypes(program.with_params({n: t.cpu() for n, t in best.items()}), program)
        huggingface.emit(changed, directory, tokenizer, checkpoint)
    else:
        if isinstance(space, LoraSpace):
            adapter, files = space.lora(name, best), lora_files
            folded = FoldLora(adapter)(program) if merge else None
        else:
            adapter, files = space.trained.road(name, best), road_files
            folded = FoldRoad()(BankRoad((adapter,))(program)) if merge else None
        if folded is None:
            files.write(adapter, directory, program, manifest)
        else:
            own = {"tpvc": tpvc.__version__, "options": manifest["options"]}
            huggingface.emit(store_dtypes(folded, program), directory, tokenizer, checkpoint)
            files.write(adapter, directory / ADAPTER, program, own)
    return json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
