"""What a fine-tuning was asked for, held against itself, an importance file and the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tpvc.compiler import frontends
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program, grid_of
from tpvc.compiler.tuning.importance_file import Importance
from tpvc.compiler.tuning.lora_space import KIND as LORA
from tpvc.compiler.tuning.weight_space import KIND as WEIGHTS

METHODS = {"hierarchical": "path", "ewc": "fisher", "l2": None, "plain": None}
"""How to fine-tune, and which importance that needs."""
PARTS = ("layers", "elements")


def load_base(model: str | Path) -> Program:
    """The model; TpvcError for one that carries adapters."""
    program = frontends.load(model)
    if program.adapters or program.prompts:
        names = ", ".join(a.name for a in (*program.adapters, *program.prompts))
        raise TpvcError(f"{model} carries adapters ({names}); fine-tune its base")
    return program


def needed_by(
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


def told_by(
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
            asked, kept = (", ".join(v) if isinstance(v, tuple) else v for v in (value, own[key]))
            raise TpvcError(f"{key} is {asked}, but the importance was recorded with {kept}; leave it out")
    return own["train"], own["targets"], own["rank"]


def check_rank(train: str, rank: int | None) -> None:
    if rank is not None and train != LORA:
        raise TpvcError(f"a rank of {rank} was asked for, which training '{train}' has not; leave it out")


def check_merge(program: Program, train: str) -> None:
    """TpvcError where there is nothing to merge, or nothing to merge it into."""
    if train == WEIGHTS:
        raise TpvcError("full weights are a checkpoint already, so there is nothing to merge; leave merging out")
    if any(grid_of(p) for p in program.params.values()):
        raise TpvcError("the model holds integers, into which no adapter can be merged; leave merging out")
