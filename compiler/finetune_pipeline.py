"""Fine-tuning on a domain without forgetting: `importance` and `finetune`, each read from top to bottom."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tpvc
from tpvc.compiler import frontends
from tpvc.compiler.adapters import lora_files, road_files
from tpvc.compiler.adapters.prompt_files import base_print
from tpvc.compiler.backends import huggingface
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import (
    ARTEFACT,
    BLOCKS,
    MANIFEST,
    check_apart,
    check_file_free,
    check_free,
    published,
    published_file,
)
from tpvc.compiler.pipeline import run_identity, versions
from tpvc.compiler.program import Program, grid_of, sha256
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.tuning import finetune_report, importance_file, layer_coefficients
from tpvc.compiler.tuning.data import check_run, steps_of
from tpvc.compiler.tuning.general_phase import DTYPES, MEASURED, general_phase, score, training
from tpvc.compiler.tuning.importance_file import Importance
from tpvc.compiler.tuning.loop import Diverged, Schedule, Tuned, descend
from tpvc.compiler.tuning.lora_space import LoraSpace
from tpvc.compiler.tuning.parallel import ranks
from tpvc.compiler.tuning.penalty import Penalty
from tpvc.compiler.tuning.phase import backward_of, domain_step, strength
from tpvc.compiler.tuning.space import Space
from tpvc.compiler.tuning.texts import read_domain, read_general, read_held_out
from tpvc.compiler.tuning.weight_space import KIND as WEIGHTS
from tpvc.compiler.tuning.weight_space import WeightSpace
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.fold_lora import FoldLora
from tpvc.passes.fold_road import FoldRoad, as_stored

METHODS = {"hierarchical": "path", "ewc": "fisher", "l2": None, "plain": None}
"""How to fine-tune, and which importance that needs."""
PARTS = ("layers", "elements")
RATIO = 0.05
"""Penalty over loss in the middle of a run, where neither phi nor a ratio is named."""
NAME, ADAPTER = "importance.safetensors", "adapter"


def importance(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "path",
    train: str = "lora",
    targets: str | Sequence[str] = "all-linear",
    rank: int = 8,
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
    train, targets, rank   what domain phases will train: see tpvc.compiler.tuning.space
    coefficients  of layers: "normalised", or the paper's "raw"

    An interrupted run goes on when the same call is made again.
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
    how = training(
        train=train,
        targets=targets,
        rank=rank,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        warmup=warmup,
        dtype=dtype,
        seed=seed,
        device=device,
    )
    progress("load", 0, 1, str(model))
    program = _base(model)
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
    general            general text: importance is recorded on `nsamples` windows of it, and every tenth is measured
    importance         a file of `importance`, which says what is trained, instead of recording it now
    method             "hierarchical": arXiv 2501.13669 in our reading; "ewc": diagonal Fisher, anchored at the model;
                       "l2": distance to the model; "plain": no penalty
    without            of hierarchical: "layers" (all coefficients 1), "elements" (all importance 1), or both
    phi, ratio         the penalty's strength, or what penalty over loss is to be in the middle of the run; None: 0.05
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
    needs = _check_method(method, without, phi, ratio, general, importance)
    if method != "plain" and phi is None and ratio is None:
        ratio = RATIO
    force = strength(0.0 if method == "plain" else phi, ratio)
    progress("load", 0, 1, str(model))
    program = _base(model)
    found = None
    if importance is not None:
        found = importance_file.read(Path(importance))
        importance_file.check_base(found, Path(importance), base_print(program))
        train, targets, rank = _told(found, needs, train, targets, rank)
    how = training(
        train=train or "lora",
        targets=targets or "all-linear",
        rank=rank or 8,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        warmup=warmup,
        dtype=dtype,
        seed=seed,
        device=device,
    )
    if merge:
        _check_merge(program, how.train)
    tokenizer = frontends.tokenizer(program)
    length = min(max_length, program.facts.context_length)
    domain = read_domain(program, tokenizer, data, validation, length, seed)
    text = None if general is None else read_general(program, tokenizer, str(general), nsamples, length, seed, progress)
    watched = (read_held_out(program, tokenizer, length) if text is None else text.checking)[:MEASURED]
    progress("load", 1, 1, "")
    steps = steps_of(epochs, steps, batch_size, len(domain.training))
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
            path = work / BLOCKS / NAME
            if not path.exists():
                kind = layer_coefficients.NORMALISED
                general_phase(program, [text], how, needs, kind, work / BLOCKS, path, own, progress)
            found = importance_file.read(path)
        space = how.space(program)
        held = how.held(program, space)
        before = [*score(space, held, how, domain.checking), score(space, held, how, watched)[0]]
        penalty = _penalty(method, without, space, found, device)
        backward = backward_of(domain.training, how.micro, space.adapter, own, device)
        step = domain_step(space, penalty, force, lambda: space.weight(held, DTYPES[dtype]), backward, steps, own)

        def validate() -> list[float]:
            return [*score(space, held, how, domain.checking), score(space, held, how, watched)[0]]

        stopped = None
        try:
            tuned = descend(
                space.params,
                [len(e.ids) for e in domain.training],
                step,
                validate,
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
                "importance": None if found is None else _about(found, importance),
                "coefficients": None if found is None else found.alpha.tolist(),
                "phi": float(force.phi),
                "ratio": _ratio(tuned, steps),
                "before": before,
                "checks": tuned.checks,
                "curve": tuned.curve,
                "kept_step": tuned.step,
                "stopped": None if stopped is None else {"step": stopped.step},
                "trainables": sum(p.numel() for p in space.params.values()),
                "drift": _drift(space, tuned.best),
                "versions": versions("torch", "transformers", "safetensors"),
            }
            _write(space, program, tokenizer, tuned.best, work / ARTEFACT, out.name, merge, manifest)
            manifest = json.loads((work / ARTEFACT / MANIFEST).read_text(encoding="utf-8"))
            seconds = time.perf_counter() - began
            finetune_report.write(work / ARTEFACT / "report.html", out.name, manifest, str(model), seconds)
            progress("write", 1, 1, str(out))
    if stopped is not None:
        raise TpvcError(
            f"the loss is no finite number at step {stopped.step}; '{out}' holds the state of step {tuned.step}, the"
            " best until then, lower the learning rate"
        )
    return out


def _base(model: str | Path) -> Program:
    program = frontends.load(model)
    if program.adapters or program.prompts:
        names = ", ".join(a.name for a in (*program.adapters, *program.prompts))
        raise TpvcError(f"{model} carries adapters ({names}); fine-tune its base")
    return program


def _check_method(
    method: str,
    without: Sequence[str],
    phi: float | None,
    ratio: float | None,
    general: str | Path | None,
    importance: str | Path | None,
) -> str | None:
    """Which importance the method needs, "path" or "fisher" or None; TpvcError for wishes that contradict it."""
    if method not in METHODS:
        raise TpvcError(f"method is '{method}'; expected one of {', '.join(METHODS)}")
    needs = METHODS[method]
    unknown = [part for part in without if part not in PARTS]
    if unknown or (without and method != "hierarchical"):
        told = f"'{unknown[0]}'" if unknown else f"'{without[0]}' of {method}"
        raise TpvcError(f"{told} was to be left out; expected one of {', '.join(PARTS)}, of the hierarchical method")
    if method == "plain" and (phi is not None or ratio is not None):
        raise TpvcError("plain fine-tuning has no penalty; leave out phi and the ratio, or choose another method")
    if needs is None and importance is not None:
        raise TpvcError(f"{method} uses no importance; leave the file out, or choose another method")
    if needs is not None and importance is None and general is None:
        raise TpvcError(
            f"{method} needs general text to record importance on, or a file of `tpvc importance`; name one of them"
        )
    return needs


def _told(
    found: Importance, needs: str | None, train: str | None, targets: str | Sequence[str] | None, rank: int | None
) -> tuple[str, str | Sequence[str], int]:
    """What is trained, as the importance file says; TpvcError where something else was asked for."""
    if found.about["method"] != needs:
        raise TpvcError(
            f"the importance is of method '{found.about['method']}', this fine-tuning needs '{needs}'; make one with"
            f" `tpvc importance --method {needs}`"
        )
    own = {"train": found.about["train"], "targets": found.about["targets"], "rank": found.about["rank"]}
    if isinstance(own["targets"], list):
        own["targets"] = tuple(own["targets"])
    given = {"train": train, "targets": targets, "rank": rank}
    if targets is not None and not isinstance(targets, str):
        given["targets"] = tuple(sorted(targets))
    for key, value in given.items():
        if value is not None and value != own[key]:
            raise TpvcError(f"{key} is {value}, but the importance was recorded with {own[key]}; leave it out")
    return own["train"], own["targets"], own["rank"]


def _check_merge(program: Program, train: str) -> None:
    if train == WEIGHTS:
        raise TpvcError("full weights are a checkpoint already, so there is nothing to merge; leave merging out")
    if any(grid_of(p) for p in program.params.values()):
        raise TpvcError("the model holds integers, into which no adapter can be merged; leave merging out")


def _about(found: Importance, path: str | Path | None) -> dict[str, Any]:
    """What a manifest says of an importance, and of the file that it came from."""
    told = {key: value for key, value in found.about.items() if key != "layers"}
    return told if path is None else {**told, "file": {"name": Path(path).name, "sha256": sha256(Path(path))}}


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


def _ratio(tuned: Tuned, steps: int) -> dict[str, float | None]:
    """Penalty over loss, means over the stretch that holds the middle of the run, and over the last one."""
    middle = next((c for c in tuned.curve if 2 * c[0] >= steps), None)
    last = tuned.curve[-1] if tuned.curve else None
    return {
        key: None if point is None or not point[1] > 0 else point[2] / point[1]
        for key, point in (("middle", middle), ("end", last))
    }


@torch.no_grad()
def _drift(space: Space, best: dict[str, Tensor]) -> list[list[float]]:
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


def _write(
    space: Space,
    program: Program,
    tokenizer: Any,
    best: dict[str, Tensor],
    directory: Path,
    name: str,
    merge: bool,
    manifest: dict[str, Any],
) -> None:
    """The result: a checkpoint, or an adapter's directory."""
    checkpoint = {
        **manifest,
        "artefact": "checkpoint",
        "source": {
            "name": program.source.name,
            "files": program.source.files,
            "config": dict(program.source.config),
        },
    }
    if isinstance(space, WeightSpace):
        changed = as_stored(program.with_params({n: t.cpu() for n, t in best.items()}), program)
        huggingface.emit(changed, directory, tokenizer, checkpoint)
        return
    if isinstance(space, LoraSpace):
        adapter, files = space.lora(name, best), lora_files
        folded = FoldLora(adapter)(program) if merge else None
    else:
        adapter, files = space.trained.road(name, best), road_files
        folded = FoldRoad()(BankRoad((adapter,))(program)) if merge else None
    if folded is None:
        files.write(adapter, directory, program, manifest)
        return
    huggingface.emit(as_stored(folded, program), directory, tokenizer, checkpoint)
    files.write(adapter, directory / ADAPTER, program, {"tpvc": tpvc.__version__, "options": manifest["options"]})
