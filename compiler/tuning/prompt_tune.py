"""`prompt_tune`: a model and examples in, a soft prompt with its start out. Read it from top to bottom.

The prompt's virtual tokens stand before every example as ids from vocab_size on (`passes.bank_prompt`); their rows are
the only parameter, and no gradient of a weight is ever made, so the weights may be integers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

import tpvc
from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import prompt_files, prompt_start
from tpvc.compiler.adapters.peft_directory import named
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.identity import run_identity
from tpvc.compiler.output import ARTEFACT, BLOCKS, check_apart, check_free, published
from tpvc.compiler.program import prompt_ids
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning import report
from tpvc.compiler.tuning.data import check_run, read_data, steps_of
from tpvc.compiler.tuning.examples import Encoded
from tpvc.compiler.tuning.loop import Schedule, tune
from tpvc.compiler.tuning.loss import answer_logits, batch_of, score_answers
from tpvc.passes.bank_prompt import ROWS, BankPrompt


def prompt_tune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    validation: str | Path | None = None,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    virtual_tokens: int | None = None,
    init: str = "vocab",
    epochs: float = 10,
    steps: int | None = None,
    batch_size: int = 8,
    lr: float = 0.3,
    warmup: float = 0.03,
    max_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Learn a soft prompt for `model`, float or quantised, from the examples in `data`; write it to `out`.

    data, validation   jsonl, csv or tsv: see tpvc.compiler.tuning.examples, also for template, columns and labels
    virtual_tokens     rows of the prompt; None: 50
    init               where it starts: see tpvc.compiler.adapters.prompt_start
    steps              optimiser steps, instead of `epochs` passes over the data
    lr, warmup         AdamW with weight decay 1e-5; linear warm-up over that share of the steps, then half a cosine
                       down to 0 (arXiv 2408.01119, supplement B, decoders)

    Only the answer has loss. The prompt with the least validation loss is kept, the untrained one included. The
    directory is what PEFT loads, with start.safetensors, tpvc.json and report.html. An interrupted run goes on when the
    same call is made again, after its last finished stretch of at most 100 steps.
    """
    out, data = Path(out), Path(data).expanduser()
    validation = None if validation is None else Path(validation).expanduser()
    given = init.removeprefix("prompt:") if init.startswith("prompt:") else None
    for source in (model, data, *([validation] if validation else []), *([given] if given else [])):
        check_apart(out, source)
    check_free(out, overwrite)
    check_run(epochs, steps, batch_size, lr, warmup, max_length)
    if virtual_tokens is not None and virtual_tokens < 1:
        raise TpvcError(f"{virtual_tokens} virtual tokens were asked for; expected at least 1")
    progress("load", 0, 1, str(model))
    program = frontends.load(model)
    tokenizer = frontends.tokenizer(program)
    start, begun = prompt_start.start(program, tokenizer, init, virtual_tokens, seed)
    banked = BankPrompt((start,))(program)
    length = min(max_length, program.facts.context_length - start.tokens)
    words = {"template": template, "columns": columns, "labels": labels}
    examples = read_data(program, tokenizer, data, validation, length, seed, **words)
    before = prompt_ids(banked, start.name)
    training, checking = behind(before, examples.training), behind(before, examples.checking)
    steps = steps_of(epochs, steps, batch_size, len(training))
    schedule = Schedule(steps, batch_size, lr, warmup, seed, "cosine", 1e-5)
    options = {
        "virtual_tokens": start.tokens,
        "init": init if given is None else f"prompt:{named(given)}",
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
    held = interpret.in_memory(program, device)
    values = start.values.to(device, copy=True).requires_grad_()

    def weight(name: str) -> torch.Tensor:
        return values if name == ROWS else held(name)

    def loss(indices: list[int]) -> torch.Tensor:
        batch = batch_of([training[i] for i in indices], device)
        return torch.nn.functional.cross_entropy(answer_logits(banked, weight, batch).float(), batch.targets)

    progress("load", 1, 1, "")
    began = time.perf_counter()
    with published(out, overwrite, resumable=True) as work:
        identity = {**run_identity(program), **options, "method": "prompt", "start": begun, "tokens": examples.digest}
        store = BlockStore.open(work / BLOCKS, identity, replace=overwrite)
        result = tune(
            {"values": values},
            {},
            [len(e.ids) for e in training],
            loss,
            lambda: score_answers(banked, weight, checking, 2 * batch_size, device=device),
            schedule,
            store,
            progress,
        )
        progress("write", 0, 1, str(out))
        base, vocabulary = prompt_files.base_print(program), prompt_files.tokenizer_print(tokenizer)
        learned = Prompt(out.name, result.best["values"].cpu(), start.start, base, vocabulary)
        manifest = {
            "tpvc": tpvc.__version__,
            "options": options,
            "start": begun,
            "data": examples.record,
            "trainables": learned.values.numel(),
            "curve": result.curve,
            "checks": result.checks,
            "kept_step": result.step,
        }
        prompt_files.write(learned, work / ARTEFACT, prompt_files.about(program), manifest)
        manifest = json.loads((work / ARTEFACT / "tpvc.json").read_text(encoding="utf-8"))
        report.write(work / ARTEFACT / "report.html", out.name, manifest, str(model), time.perf_counter() - began)
        progress("write", 1, 1, str(out))
    return out


def behind(before: list[int], examples: list[Encoded]) -> list[Encoded]:
    """The examples with these ids in front."""
    return [replace(e, ids=(*before, *e.ids), answer=len(before) + e.answer) for e in examples]
