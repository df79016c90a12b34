"""Fine-tuning on a domain without forgetting: `importance` and `finetune`, each read from top to bottom."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import tpvc
from tpvc.compiler import finetune_write, frontends
from tpvc.compiler.adapters.prompt_files import base_print
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.finetune_checks import check_merge, check_rank, load_base, needed_by, told_by
from tpvc.compiler.identity import run_identity, versions
from tpvc.compiler.output import (
    ARTEFACT,
    BLOCKS,
    check_apart,
    check_file_free,
    check_free,
    published,
    published_file,
)
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.tuning import finetune_report, importance_file, layer_coefficients
from tpvc.compiler.tuning.data import check_run, steps_of
from tpvc.compiler.tuning.general_phase import DTYPES, MEASURED, general_phase, score, training
from tpvc.compiler.tuning.importance_file import Importance
from tpvc.compiler.tuning.loop import Diverged, Schedule, descend
from tpvc.compiler.tuning.parallel import ranks
from tpvc.compiler.tuning.penalty import Penalty
from tpvc.compiler.tuning.phase import backward_of, domain_step, strength
from tpvc.compiler.tuning.space import LINEARS, RATES, Space
from tpvc.compiler.tuning.texts import read_domain, read_general, read_held_out

RATIO = 0.02
"""Penalty over loss where a quarter of the run has gone without one, where neither phi nor a ratio is named."""
RANK = 8
RECORDED = "importance.safetensors"


def importance(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "path",
    train: str = "lora",
    targets: str | Sequence[str] = LINEARS,
    rank: int | None = None,
    coefficients: str = layer_coefficients.NORMALISED,
    nsamples: int = 512,
    max_length: int = 256,
    batch_size: int = 16,
    micro_batch: int = 4,
    lr: float | None = None,
    warmup: float = 0.1,
    dtype: str = "float32",
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Learn general text with `model` for one epoch and write how important every trained element is for it: a file.

    data          general text, or several, learned one after the other: as `tpvc quantize --dataset` takes it;
                  `nsamples` windows of `max_length` tokens of each, of which every tenth is only measured
    method        "path": the method of arXiv 2501.13669 in our reading; "fisher": the diagonal that EWC takes
    train, targets, rank   what domain phases will train: see tpvc.compiler.tuning.space; rank None: 8
    coefficients  of layers: "normalised", or the paper's "raw"

    An interrupted run goes on when the same call is made again; one of "fisher" begins again.
    """
    out = Path(out)
    given = [str(d) for d in ([data] if isinstance(data, str | Path) else data)]
    for source in (model, *given):
        check_apart(out, source)
    check_file_free(out, overwrite, lambda path: importance_file.about(path) is not None)
    check_run(1, None, batch_size, 1.0 if lr is None else lr, warmup, max_length)
    if coefficients not in layer_coefficients.KINDS:
        raise TpvcError(
            f"layer coefficients are '{coefficients}'; expected one of {', '.join(layer_coefficients.KINDS)}"
        )
    if (method, coefficients) == ("fisher", layer_coefficients.RAW):
        raise TpvcError("a Fisher matrix has no layer coefficients; leave them out, or record --method path")
    check_rank(train, rank)
    how = training(
        train=train,
        targets=targets,
        rank=RANK if rank is None else rank,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        warmup=warmup,
        dtype=dtype,
        seed=seed,
        device=device,
    )
    progress("load", 0, 1, str(model))
    program = load_base(model)
    tokenizer = frontends.tokenizer(program)
    length = min(max_length, program.facts.context_length)
    texts = [read_general(program, tokenizer, text, nsamples, length, seed, progress) for text in given]
    progress("load", 1, 1, "")
    identity = {
        **run_identity(program),
        "method": method,
        "training": str(how),
        "coefficients": coefficients,
        "texts": [text.digest for text in texts],
    }
    with ranks(device) as own, own.published(out, published_file(out)) as work:
        own.store(work / BLOCKS, identity, replace=overwrite)
        general_phase(program, texts, how, method, coefficients, work / BLOCKS, work / ARTEFACT, own, progress)
    return out


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    general: str | Path | None = None,
    importance: str | Path | None = None,
    method: str = "hierarchical",
    without: Sequence[str] = (),
    phi: float | None = None,
    ratio: float | None = None,
    validation: str | Path | None = None,
    train: str | None = None,
    targets: str | Sequence[str] | None = None,
    rank: int | None = None,
    epochs: float = 3,
    steps: int | None = None,
    batch_size: int = 16,
    micro_batch: int = 4,
    lr: float | None = None,
    warmup: float = 0.1,
    max_length: int = 256,
    nsamples: int = 512,
    dtype: str = "float32",
    merge: bool = False,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Fine-tune `model` on the domain in `data` while a penalty holds what matters for general text; write `out`.

    data, validation   examples or text: see tpvc.compiler.tuning.texts
    general            general text: importance is recorded on `nsamples` windows of it, at the default rate whatever
                       `lr` is, and every tenth is measured
    importance         a file of `importance`, which says what is trained, instead of recording it now
    method             "hierarchical": arXiv 2501.13669 in our reading; "ewc": diagonal Fisher, anchored at the model;
                       "l2": distance to the model; "plain": no penalty
    without            of hierarchical: "layers" (all coefficients 1), "elements" (all importance 1), or both
    phi, ratio         the penalty's strength, or what penalty over loss is to be where a quarter of the run has gone
                       without one; None: RATIO
    train, targets, rank   what is trained: see tpvc.compiler.tuning.space; None: lora, all-linear, 8
    merge              write an adapter folded into the weights, and itself beside them in `adapter`

    Full weights, and merged adapters, are a checkpoint; adapters a directory that PEFT loads. The state with the least
    validation loss is kept. An interrupted run goes on when the same call is made again.
    """
    out, data = Path(out), Path(data).expanduser()
    validation = None if validation is None else Path(validation).expanduser()
    for source in (model, data, *(s for s in (validation, general, importance) if s is not None)):
        check_apart(out, source)
    check_free(out, overwrite)
    check_run(epochs, steps, batch_size, 1.0 if lr is None else lr, warmup, max_length)
    needs = needed_by(method, without, phi, ratio, general, importance)
    if method != "plain" and phi is None and ratio is None:
        ratio = RATIO
    force = strength(0.0 if method == "plain" else phi, ratio)
    progress("load", 0, 1, str(model))
    program = load_base(model)
    found = None
    if importance is None:
        check_rank(train or "lora", rank)
    else:
        importance = Path(importance).expanduser()
        found = importance_file.read(importance)
        importance_file.check_base(found, importance, base_print(program))
        check_rank(found.about["train"], rank)
        train, targets, rank = told_by(found, needs, train, targets, rank)
    how = training(
        train="lora" if train is None else train,
        targets=LINEARS if targets is None else targets,
        rank=RANK if rank is None else rank,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        warmup=warmup,
        dtype=dtype,
        seed=seed,
        device=device,
    )
    if merge:
        check_merge(program, how.train)
    tokenizer = frontends.tokenizer(program)
    length = min(max_length, program.facts.context_length)
    domain = read_domain(program, tokenizer, data, validation, length, seed)
    text = None if general is None else read_general(program, tokenizer, str(general), nsamples, length, seed, progress)
    watched = (read_held_out(tokenizer, length) if text is None else text.checking)[:MEASURED]
    progress("load", 1, 1, "")
    steps = steps_of(epochs, steps, batch_size, len(domain.training))
    if ratio and steps < 2:
        raise TpvcError(
            "a run of 1 step ends before its penalty sets in, at a quarter of the run but not before the second step;"
            " ask for more steps or epochs, or for a phi, which holds from the first"
        )
    options = {
        "method": method,
        "without": sorted(without),
        "phi": phi,
        "ratio": ratio,
        "train": how.train,
        "targets": how.targets if isinstance(how.targets, str) else list(how.targets),
        "rank": how.rank if how.train == "lora" else None,
        "steps": steps,
        "batch_size": batch_size,
        "micro_batch": how.micro,
        "lr": how.lr,
        "warmup": warmup,
        "max_length": length,
        "nsamples": None if text is None else nsamples,
        "merge": merge,
        "dtype": dtype,
        "seed": seed,
        "device": device,
    }
    identity = {
        **run_identity(program),
        **options,
        "tokens": domain.digest,
        "general": None if text is None else text.digest,
        "importance": None if found is None else found.about,
    }
    began = time.perf_counter()
    with ranks(device) as own, own.published(out, published(out, overwrite, resumable=True)) as work:
        store = own.store(work / BLOCKS, identity, replace=overwrite)
        if needs is not None and found is None:
            path = work / BLOCKS / RECORDED
            if not path.exists():
                kind = layer_coefficients.NORMALISED
                usual = replace(how, lr=RATES[how.train])  # a strong rate would forget before the domain begins
                general_phase(program, [text], usual, needs, kind, work / BLOCKS, path, own, progress)
            found = importance_file.read(path)
        space = how.space(program)
        if importance is not None:
            importance_file.check_space(found, importance, space)
        held = how.held(program, space)

        def measured() -> list[float]:
            return [*score(space, held, how, domain.checking), score(space, held, how, watched)[0]]

        before = measured()
        penalty = _penalty(method, without, space, found, device)
        backward = backward_of(domain.training, how.micro, space.adapter, own, device)
        step = domain_step(space, penalty, force, lambda: space.weight(held, DTYPES[dtype]), backward, steps, own)

        stopped = None
        try:
            tuned = descend(
                space.params,
                [len(e.ids) for e in domain.training],
                step,
                measured,
                Schedule(steps, batch_size, how.lr, warmup, seed),
                store,
                also={"phi": force.phi},
                progress=own.told(progress),
            )
        except Diverged as diverged:
            tuned, stopped = diverged.tuned, diverged
            if tuned.step == 0:
                own.wait()
                if own.rank == 0:
                    shutil.rmtree(work / BLOCKS, ignore_errors=True)
                raise
        if own.rank == 0:
            progress("write", 0, 1, str(out))
            manifest = {
                "tpvc": tpvc.__version__,
                "options": options,
                "data": domain.record,
                "general": {"windows": len(watched), **({"text": "held_out"} if text is None else text.record)},
                "importance": None if found is None else finetune_write.about(found, importance),
                "coefficients": found.alpha.tolist() if needs == "path" and "layers" not in without else None,
                "phi": float(force.phi),
                "ratio": finetune_write.ratios(tuned, steps),
                "before": before,
                "checks": tuned.checks,
                "curve": tuned.curve,
                "kept_step": tuned.step,
                "stopped": None if stopped is None else {"step": stopped.step},
                "trainables": sum(p.numel() for p in space.params.values()),
                "drift": finetune_write.drift(space, tuned.best),
                "versions": versions("torch", "transformers", "safetensors"),
            }
            place = work / ARTEFACT
            told = finetune_write.write(space, program, tokenizer, tuned.best, place, out.name, merge, manifest)
            finetune_report.write(place / "report.html", out.name, told, str(model), time.perf_counter() - began)
            progress("write", 1, 1, str(out))
    if stopped is not None:
        raise TpvcError(
            f"the loss is no finite number at step {stopped.step}; '{out}' holds the state of step {tuned.step}, the"
            " best until then, lower the learning rate"
        )
    return out


@torch.no_grad()
def _penalty(
    method: str, without: Sequence[str], space: Space, found: Importance | None, device: str
) -> Penalty | None:
    """The method's penalty; puts the space where it is anchored. `found`: of methods that have an importance."""
    if method == "plain":
        return None
    if found is None or not found.anchor:
        anchor = {name: p.detach().clone() for name, p in space.params.items()}
    else:
        anchor = {name: found.anchor[name].to(device) for name in space.params}
        for name, p in space.params.items():
            p.copy_(anchor[name])
    if found is None:
        return Penalty(anchor)
    own = found.to(device)
    omega = None if "elements" in without else own.omega
    return Penalty(anchor, omega, None if "layers" in without else own.coefficients)
