"""The general phase: how important every element of what is trained is for general text, written to a file."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tpvc
from tpvc.compiler.adapters.prompt_files import base_print
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.identity import run_identity
from tpvc.compiler.interpret import Weight
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import Program
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.tuning import importance_file
from tpvc.compiler.tuning.data import Data
from tpvc.compiler.tuning.examples import Encoded
from tpvc.compiler.tuning.fisher import fisher
from tpvc.compiler.tuning.importance import C, Clamped, importance
from tpvc.compiler.tuning.loop import Diverged, Schedule, descend
from tpvc.compiler.tuning.loss import score_answers
from tpvc.compiler.tuning.parallel import Ranks
from tpvc.compiler.tuning.phase import backward_of, general_step
from tpvc.compiler.tuning.space import RATES, Space, held_by, make_space
from tpvc.compiler.tuning.weight_space import WeightSpace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEASURED = 32
"""Windows of general text that are measured, at most."""


@dataclass(frozen=True)
class Training:
    """How both phases train.

    train, targets, rank   what: see tuning.space
    batch, micro           examples of an optimiser step, and how many of them are computed at once
    lr, warmup             AdamW without weight decay: the highest rate, and the share of the steps on which it climbs
    dtype                  "float32" or "bfloat16": of weights and activations in the graph; masters are float32
    """

    train: str
    targets: str | tuple[str, ...]
    rank: int
    batch: int
    micro: int
    lr: float
    warmup: float
    dtype: str
    seed: int
    device: str

    def space(self, program: Program) -> Space:
        return make_space(program, self.train, self.targets, self.rank, self.seed, self.device)

    def held(self, program: Program, space: Space) -> Weight:
        return held_by(program, space, self.device, DTYPES[self.dtype])


def training(
    *,
    train: str,
    targets: str | Sequence[str],
    rank: int,
    batch_size: int,
    micro_batch: int,
    lr: float | None,
    warmup: float,
    dtype: str,
    seed: int,
    device: str,
) -> Training:
    """TpvcError for what no training can have; without a rate that of the space is taken."""
    if train not in RATES:
        raise TpvcError(f"what to train is '{train}'; expected one of {', '.join(RATES)}")
    if dtype not in DTYPES:
        raise TpvcError(f"dtype is '{dtype}'; expected one of {', '.join(DTYPES)}")
    micro = min(micro_batch, batch_size)
    if micro < 1 or rank < 1:
        raise TpvcError(f"found a rank of {rank} and {micro} examples at once; expected numbers above 0")
    named = targets if isinstance(targets, str) else tuple(sorted(targets))
    rate = RATES[train] if lr is None else lr
    return Training(train, named, rank, batch_size, micro, rate, warmup, dtype, seed, device)


def score(space: Space, held: Weight, how: Training, examples: Sequence[Encoded]) -> list[float]:
    """[mean loss in nats a token, share of exact answers] of the space as it is."""
    with torch.no_grad():
        program, weight = space.weight(held, DTYPES[how.dtype])
        found = score_answers(program, weight, examples, 2 * how.micro, space.adapter, how.device, OPS)
    return [found.loss, found.exact]


def general_phase(
    program: Program,
    texts: Sequence[Data],
    how: Training,
    method: str,
    coefficients: str,
    directory: Path,
    path: Path,
    ranks: Ranks,
    progress: Progress = silent,
) -> None:
    """Learn the texts one after the other and write their importance to `path`; its state is kept in `directory`.

    method  "path": tuning.importance, with theta* where the last text ended; "fisher": tuning.fisher, at the model
    """
    if method not in importance_file.METHODS:
        raise TpvcError(f"importance is '{method}'; expected one of {', '.join(importance_file.METHODS)}")
    progress = ranks.told(progress)
    space = how.space(program)
    held = how.held(program, space)
    watched = [e for text in texts for e in text.checking][:MEASURED]
    about: dict[str, Any] = {
        "tpvc": tpvc.__version__,
        "method": method,
        "base": base_print(program),
        "model": None if program.source is None else program.source.name,
        "train": how.train,
        "targets": how.targets,
        "rank": how.rank,
        "seed": how.seed,
        "dtype": how.dtype,
        "data": [text.record for text in texts],
        "tokens": sum(len(e.ids) for text in texts for e in text.training),
        "trainables": sum(p.numel() for p in space.params.values()),
        "model_bytes": sum(math.prod(p.shape) * p.dtype.itemsize for p in program.params.values()),
        "protected": sum(space.value(name).numel() for name in space.layers),
        "loss_before": score(space, held, how, watched)[0],
    }
    if method == "fisher":
        omega, told, anchor = _fisher(space, held, how, texts, ranks, progress), {}, {}
    else:
        omega, told = _learned(program, space, held, how, texts, directory, ranks, progress)
        anchor = {name: _stored(program, space, name, p) for name, p in space.params.items()}
        after = score(space, held, how, watched)[0]
        if not math.isfinite(after):
            _forget(directory, ranks)
            raise TpvcError(f"behind general text the loss is {after}; expected a number, lower the learning rate")
        told |= {"loss_after": after, "coefficients": coefficients}
    if ranks.rank == 0:
        partial = directory / f"{path.name}.new"
        importance_file.write(
            partial, omega, space, anchor, coefficients if method == "path" else None, {**about, **told}
        )
        os.replace(partial, path)
    ranks.wait()


def _learned(
    program: Program,
    space: Space,
    held: Weight,
    how: Training,
    texts: Sequence[Data],
    directory: Path,
    ranks: Ranks,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(Omega, float32 by protected name, what is to be said of how it came about)."""
    total: dict[str, Tensor] = {}
    clamped, steps = Clamped(0, 0.0, 0.0), []
    for number, text in enumerate(texts):
        omega = {name: torch.zeros_like(space.value(name)) for name in space.layers}
        start = {name: p.detach().clone() for name, p in space.params.items()}
        also = {f"omega/{n}": t for n, t in omega.items()} | {f"start/{n}": t for n, t in start.items()}
        schedule = Schedule(
            max(1, round(len(text.training) / how.batch)), how.batch, how.lr, how.warmup, how.seed + number
        )
        identity = {**run_identity(program), "training": str(how), "texts": [t.digest for t in texts[: number + 1]]}
        store = ranks.store(directory / f"general-{number}", identity, replace=True)
        backward = backward_of(text.training, how.micro, space.adapter, ranks, how.device)
        step = general_step(
            space, omega, lambda leaves: lambda: space.seen(held, DTYPES[how.dtype], leaves), backward, ranks
        )
        stage = "general" if len(texts) == 1 else f"general {number + 1}"
        lengths = [len(e.ids) for e in text.training]
        try:
            descend(space.params, lengths, step, None, schedule, store, also=also, stage=stage, progress=progress)
        except Diverged as diverged:
            _forget(directory, ranks)
            raise TpvcError(f"on general text {diverged}") from diverged
        for name in space.layers:
            own, told = importance(omega.pop(name), space.value(name) - space.value(name, start))
            total[name] = own if number == 0 else total[name] + own
            clamped = Clamped(clamped.elements + told.elements, clamped.mass + told.mass, clamped.total + told.total)
        steps.append(schedule.steps)
    return total, {
        "steps": steps,
        "batch": how.batch,
        "lr": how.lr,
        "warmup": how.warmup,
        "xi": {"of": "the mean squared movement of a tensor", "share": C},
        "omega_sum": clamped.total,
        "clamped": {"elements": clamped.elements, "sum": clamped.mass},
    }


def _forget(directory: Path, ranks: Ranks) -> None:
    """Remove what was learned of all texts: it would only bring the next run to the same end."""
    ranks.wait()
    if ranks.rank == 0:
        for store in directory.glob("general-*"):
            shutil.rmtree(store, ignore_errors=True)


def _fisher(
    space: Space, held: Weight, how: Training, texts: Sequence[Data], ranks: Ranks, progress: Progress
) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(space.value(name)) for name in space.layers}
    for text in texts:
        backward = backward_of(text.training, 1, space.adapter, Ranks(), how.device)

        def see(leaves: dict[str, Tensor]) -> Any:
            return lambda: space.seen(held, DTYPES[how.dtype], leaves)

        for name, value in fisher(space, see, len(text.training), backward, ranks, progress).items():
            total[name] += value
    return total


def _stored(program: Program, space: Space, name: str, value: Tensor) -> Tensor:
    """A parameter at theta*, as a checkpoint would hold it: weights in the model's dtype, adapters in float32."""
    return value.detach().to(program.params[name].dtype if isinstance(space, WeightSpace) else torch.float32)
