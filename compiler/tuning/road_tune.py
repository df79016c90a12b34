"""`road_tune`: a model and examples in, a RoAd adapter in PEFT's format out. Read it from top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import tpvc
from tpvc.compiler import frontends, interpret
from tpvc.compiler.identity import run_identity
from tpvc.compiler.output import ARTEFACT, BLOCKS, check_apart, check_free, published
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning import report, road
from tpvc.compiler.tuning.data import check_run, read_data, steps_of
from tpvc.compiler.tuning.loop import Schedule, tune
from tpvc.compiler.tuning.loss import batch_of, score_answers


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
    check_run(epochs, steps, batch_size, lr, warmup, max_length)
    progress("load", 0, 1, str(model))
    program = frontends.load(model)
    tokenizer = frontends.tokenizer(program)
    wanted = road.shape(program, variant, group, targets, pairs)
    length = min(max_length, program.facts.context_length)

    words = {"template": template, "columns": columns, "labels": labels}
    examples = read_data(program, tokenizer, data, validation, length, seed, **words)
    training, checking = examples.training, examples.checking
    steps = steps_of(epochs, steps, batch_size, len(training))
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
    trained = road.trainee(program, wanted, device)
    base = interpret.in_memory(program, device)
    progress("load", 1, 1, "")

    began = time.perf_counter()
    with published(out, overwrite, resumable=True) as work:
        identity = {**run_identity(program), **options, "method": "road", "tokens": examples.digest}
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
            "data": examples.record,
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
