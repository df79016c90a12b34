"""What is done with trained RoAd adapters: `road_merge`, `road_unmerge` and `road_compose`, each read top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import tpvc
from tpvc.compiler import frontends
from tpvc.compiler.adapters import compose_road, road_files
from tpvc.compiler.adapters.road import Road
from tpvc.compiler.backends import huggingface
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.identity import versions
from tpvc.compiler.output import ARTEFACT, check_apart, check_free, published
from tpvc.compiler.program import Lazy, Program, read
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.verify import verify
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.fold_road import FoldRoad
from tpvc.passes.store_dtypes import store_dtypes

KINDS = ("disjoint", "product", "interpolate")


def road_merge(
    model: str | Path,
    road: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Fold the adapter in the directory `road`, called `name`, into the float weights of `model`: a checkpoint.

    W' = R W and b' = R b, computed in float32 and rounded once, to the dtype that the model stores them in.
    """
    return _rewritten("merge", model, road, out, name, overwrite, progress)


def road_unmerge(
    model: str | Path,
    road: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """The inverse of `road_merge`, in closed form: `model` as it was before the adapter was folded in, up to rounding.

    TpvcError where a rotation is singular, or where the model's tpvc.json says that another adapter was folded in last.
    Where the original weights are kept, they are the better source.
    """
    return _rewritten("unmerge", model, road, out, name, overwrite, progress)


def road_compose(
    kind: str,
    roads: Mapping[str, str | Path],
    model: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """A new adapter of `model` from {name: directory} of trained ones, as a directory that PEFT loads.

    kind     "disjoint", "product" or "interpolate": see tpvc.compiler.adapters.compose_road
    weights  of interpolate, one for each adapter in order; None: their mean
    """
    out = Path(out)
    if kind not in KINDS:
        raise TpvcError(f"the kind of composition is '{kind}'; expected one of {', '.join(KINDS)}")
    if weights is not None and kind != "interpolate":
        raise TpvcError(f"weights were given for {kind}, which has none; leave them out, or use interpolate")
    for source in (model, *roads.values()):
        check_apart(out, source)
    check_free(out, overwrite)
    progress("load", 0, 1, str(model))
    program = frontends.load(model)
    parts = frontends.read_roads(program, roads)
    progress("load", 1, 1, "")
    if kind == "interpolate":
        weights = [1 / len(parts)] * len(parts) if weights is None else weights
        made = compose_road.interpolate(out.name, parts, weights)
    else:
        made = {"disjoint": compose_road.disjoint, "product": compose_road.product}[kind](out.name, parts)
    extra = {
        "tpvc": tpvc.__version__,
        "origin": dict(made.origin),
        "adapters": [part.record for part in parts],
        "trainables": made.trainables,
        "versions": versions("torch", "safetensors"),
    }
    with published(out, overwrite) as work:
        road_files.write(made, work / ARTEFACT, program, extra)
    return out


def _rewritten(
    direction: str,
    model: str | Path,
    directory: str | Path,
    out: str | Path,
    name: str | None,
    overwrite: bool,
    progress: Progress,
) -> Path:
    out, directory = Path(out), Path(directory)
    for source in (model, directory):
        check_apart(out, source)
    check_free(out, overwrite)
    progress("load", 0, 1, str(model))
    program = frontends.load(model)
    tokenizer = frontends.tokenizer(program)
    (road,) = frontends.read_roads(program, {name or directory.name: directory})
    if direction == "unmerge":
        _check_merged(road, program)
    progress("load", 1, 1, "")
    fold = FoldRoad(inverse=direction == "unmerge")
    folded = verify(fold(verify(BankRoad((road,))(program), after="BankRoad")), after="FoldRoad")
    written = _told(store_dtypes(folded, program), program, direction, progress)
    manifest = {
        "tpvc": tpvc.__version__,
        "artefact": "checkpoint",
        "source": program.source.record,
        "options": {"road": road.name, "direction": direction},
        "passes": [{"name": "FoldRoad", "inverse": fold.inverse}],
        "road": road.record,
        "versions": versions("torch", "transformers", "safetensors"),
    }
    with published(out, overwrite) as work:
        huggingface.emit(written, work / ARTEFACT, tokenizer, manifest)
    return out


def _check_merged(road: Road, program: Program) -> None:
    """Refuse to take out another adapter than the one that the model's own tpvc.json says was folded in last."""
    match frontends.manifest(program):
        case {"options": {"direction": "merge", "road": str(name)}, "road": {"sha256": str(folded)}}:
            if folded != road.origin["sha256"]:
                raise TpvcError(
                    f"'{name}' ({folded[:12]}) was folded into {program.source.name} last, and '{road.name}' is another"
                    f" adapter ({road.origin['sha256'][:12]}); expected the directory of '{name}'"
                )


def _told(written: Program, program: Program, direction: str, progress: Progress) -> Program:
    """`written`, whose changed parameters say so when they are read, which writing does one by one."""
    changed = [name for name, p in written.params.items() if p is not program.params[name]]

    def lazy(done: int, name: str) -> Lazy:
        parameter = written.params[name]

        def make() -> torch.Tensor:
            progress(direction, done, len(changed), name)
            return read(parameter)

        return Lazy(tuple(parameter.shape), parameter.dtype, make)

    return written.with_params({name: lazy(done, name) for done, name in enumerate(changed, 1)})
