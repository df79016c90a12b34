"""`road_tune`: a model and examples in, a RoAd adapter in PEFT's format out. Read it from top to bottom."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import tpvc
from tpvc.compiler import frontends, interpret
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import ARTEFACT, BLOCKS, check_apart, check_free, published
from tpvc.compiler.pipeline import run_identity
from tpvc.compiler.program import sha256
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning import report, road
from tpvc.compiler.tuning.examples import Encoded, encode_examples, read_examples
from tpvc.compiler.tuning.loop import Schedule, tune
from tpvc.compiler.tuning.loss import batch_of, score_answers

HELD_OUT, AT_MOST = 10, 500
"""Without a validation file every tenth example is kept from training, at most 500 of them."""


def road_tune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    validation: str | Path | None = None,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    variant: str = "road_1",
    group: int | None = None,
    targets: str | Sequence[str] = road.ALL,
    pairs: str = "all",
    epochs: float = 3,
    steps: int | None = None,
    batch_size: int = 16,
    lr: float = 3e-3,
    warmup: float = 0.1,
    max_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Learn a RoAd adapter for `model`, float or quantised, from the examples in `data`; write it to `out`.

    data, validation   jsonl, csv or tsv: see tpvc.compiler.tuning.examples, also for template, columns and labels
    variant, group     road_1, road_2 or road_4; outputs paired among themselves, None: the largest up to 64 that fits
    targets            "all-linear": every linear of every block; or last parts of names, such as q_proj
    pairs              "first" or "second" trains one half of every linear's pairs, to be combined with the other
    steps              optimiser steps, instead of `epochs` passes over the data
    lr, warmup         AdamW without weight decay; linear warm-up over that share of the steps, then linearly to 0

    Only the answer has loss. The adapter with the least validation loss is kept, the untrained one included. The
    directory is what PEFT loads, with tpvc.json and report.html. An interrupted run goes on when the same call is made
    again, after its last finished stretch of at most 100 steps.
    """
    out, data = Path(out), Path(data).expanduser()
    validation = None if validation is None else Path(validation).expanduser()
    for given in (model, data, *([validation] if validation else [])):
        check_apart(out, given)
    check_free(out, overwrite)
    _check(epochs, steps, batch_size, lr, warmup, max_length)
    progress("load", 0, 1, str(model))
    program = frontends.load(model)
    tokenizer = frontends.tokenizer(program)
    wanted = road.shape(program, variant, group, targets, pairs)
    length = min(max_length, program.facts.context_length)

    def encoded(path: str | Path) -> list[Encoded]:
        examples = read_examples(Path(path), template=template, columns=columns, labels=labels)
        made = encode_examples(tokenizer, examples, length, next(iter(program.facts.eos), None))
        highest = max(max(e.ids) for e in made)
        if highest >= program.facts.vocab_size:
            raise TpvcError(
                f"{path} has token {highest}, the model knows {program.facts.vocab_size}; the tokenizer is not this"
                " model's"
            )
        return made

    training, checking = encoded(data), None if validation is None else encoded(validation)
    if checking is None:
        training, checking = held_out(training, seed, str(data))
    steps = max(1, round(epochs * len(training) / batch_size)) if steps is None else steps
    schedule = Schedule(steps, batch_size, lr, warmup, seed)
    options = {
        "variant": variant,
        "group": wanted.group,
        "targets": targets if isinstance(targets, str) else sorted(targets),
        "pairs": pairs,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "warmup": warmup,
        "max_length": length,
        "seed": seed,
        "device": device,
        "template": template,
        "columns": None if columns is None else dict(columns),
        "labels": None if labels is None else dict(labels),
    }
    files = {"training": {"name": data.name, "sha256": sha256(data)}}
    if validation is not None:
        files["validation"] = {"name": validation.name, "sha256": sha256(validation)}
    trained = road.trainee(program, wanted, device)
    base = interpret.in_memory(program, device)
    progress("load", 1, 1, "")

    began = time.perf_counter()
    with published(out, overwrite, resumable=True) as work:
        identity = {**run_identity(program), **options, "method": "road", "tokens": _digest(training, checking)}
        store = BlockStore.open(work / BLOCKS, identity, replace=overwrite)
        result = tune(
            trained.params,
            trained.masks,
            [len(e.ids) for e in training],
            road.loss_of(trained, base, lambda indices: batch_of([training[i] for i in indices], device)),
            lambda: score_answers(trained.program, trained.weight(base), checking, 2 * batch_size, 0, device),
            schedule,
            store,
            progress,
        )
        progress("write", 0, 1, str(out))
        learned = trained.road(out.name, result.best)
        manifest = {
            "tpvc": tpvc.__version__,
            "options": options,
            "data": {"files": files, "training": len(training), "validation": len(checking)},
            "trainables": learned.trainables,
            "curve": result.curve,
            "checks": result.checks,
            "kept_step": result.step,
        }
        from tpvc.compiler.adapters import road_files

        road_files.write(learned, work / ARTEFACT, program, manifest)
        manifest = json.loads((work / ARTEFACT / "tpvc.json").read_text(encoding="utf-8"))
        report.write(work / ARTEFACT / "report.html", out.name, manifest, str(model), time.perf_counter() - began)
        progress("write", 1, 1, str(out))
    return out


def held_out(examples: list[Encoded], seed: int, name: str) -> tuple[list[Encoded], list[Encoded]]:
    """(training, validation): a tenth, drawn with the seed, is kept from training."""
    count = min(AT_MOST, len(examples) // HELD_OUT)
    if count < 1:
        raise TpvcError(
            f"{name} holds {len(examples)} examples; expected at least {HELD_OUT}, or name a --validation file"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = set(order[:count])
    return [e for i, e in enumerate(examples) if i not in kept], [examples[i] for i in sorted(kept)]


def _digest(*parts: list[Encoded]) -> str:
    """sha256 of the tokens of all examples and where their answers begin."""
    return hashlib.sha256(json.dumps([[(e.answer, e.ids) for e in part] for part in parts]).encode()).hexdigest()


def _check(epochs: float, steps: int | None, batch_size: int, lr: float, warmup: float, max_length: int) -> None:
    if (steps is not None and steps < 1) or not 0 < epochs < float("inf") or batch_size < 1 or max_length < 2:
        raise TpvcError(
            f"found {epochs:g} epochs, {steps} steps, batches of {batch_size} and {max_length} tokens;"
            " expected numbers above 0, and at least 2 tokens"
        )
    if not (0 < lr < float("inf")) or not 0 <= warmup < 1:
        raise TpvcError(f"found rate {lr:g} and warm-up {warmup:g}; expected a rate above 0 and a warm-up from 0 to 1")
