"""Two readings of one model, compared number by number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program, QTensor, bank_params, dense, input_grids, linears, read
from tpvc.compiler.progress import Progress
from tpvc.passes.reorder import orders

Value = QTensor | torch.Tensor
Found = Iterable[tuple[str, Callable[[], Value]]]
"""(parameter, how it is read), each parameter at least once: a file may hold one twice."""


@dataclass
class Count:
    """integers: matrices whose integers agree; floats: tensors that do; rounded: integers that are floats there."""

    integers: int = 0
    floats: int = 0
    rounded: int = 0

    def __str__(self) -> str:
        said = [_matrices(self.integers), f"{self.floats} float tensor{'s' * (self.floats != 1)}"]
        return ", ".join(said + [f"{_matrices(self.rounded)} in float, rounded once"] * bool(self.rounded))


def _matrices(count: int) -> str:
    return f"{count} integer {'matrix' if count == 1 else 'matrices'}"


def names(program: Program) -> list[str]:
    """Parameters that a checkpoint holds; adapters and prompts brought the others."""
    brought = bank_params(program)
    return [name for name in program.params if name not in brought]


def read_all(program: Program, progress: Progress) -> Count:
    """Read every parameter: its reader refuses codes beyond their bits, and NaN."""
    wanted, count = names(program), Count()
    for done, name in enumerate(wanted):
        progress("read", done, len(wanted), name)
        value = read(program.params[name])
        count.integers += isinstance(value, QTensor)
        count.floats += not isinstance(value, QTensor)
    progress("read", len(wanted), len(wanted), "")
    return count


def of_program(program: Program, wanted: Program) -> Found:
    """The parameters of another checkpoint of one model, in which a tied head may have a matrix of its own, or the
    other way round. TpvcError where it is another model."""
    ours, theirs = _head(wanted), _head(program)
    untied = {ours, theirs} if ours != theirs and (_tied(wanted) or _tied(program)) else set()
    here, there = set(names(wanted)), set(names(program))
    if missing := sorted((here ^ there) - untied):
        raise TpvcError(f"the models differ: only one has '{missing[0]}'; name directories that were made of one model")
    order_here, order_there = orders(wanted), orders(program)
    for name in sorted({*order_here, *order_there}):
        if order_here.get(name) != order_there.get(name):
            raise TpvcError(f"the columns of '{name}' are in groups by activation order in one and not so in the other")
    grids_here, grids_there = input_grids(wanted), input_grids(program)
    for name in sorted({*grids_here, *grids_there}):
        if grids_here.get(name) != grids_there.get(name):
            ours, theirs = (g.get(name, "no static grid") for g in (grids_here, grids_there))
            raise TpvcError(
                f"what '{name}' reads is rounded on (scale, zero point) {ours} in one, {theirs} in the other"
            )
    for name in names(wanted):
        if name in there:
            yield name, lambda name=name: read(program.params[name])
    if untied:
        yield ours, lambda: read(program.params[theirs])


def _head(program: Program) -> str:
    """The matrix that yields the logits."""
    return linears(program.nodes)[-1].params["weight"]


def _tied(program: Program) -> bool:
    return any(n.op == "embed" and n.params["weight"] == _head(program) for n in program.nodes)


def compare(program: Program, found: Found, target: str, reference: str, progress: Progress) -> Count:
    """Compare all parameters of `program` (`reference` is its name) with those that `target` holds."""
    wanted, count = set(names(program)), Count()
    total, left = len(wanted), set(wanted)
    for name, reading in found:
        progress("compare", total - len(left), total, name)
        ours, theirs = read(program.params[name]), reading()
        check_same(name, ours, theirs, target, reference)
        if name in left:
            count.integers += isinstance(theirs, QTensor)
            count.floats += not isinstance(ours, QTensor)
            count.rounded += isinstance(ours, QTensor) and not isinstance(theirs, QTensor)
        left.discard(name)
    if left:
        raise TpvcError(f"'{target}' holds no numbers of '{min(left)}', which '{reference}' has; export it again")
    progress("compare", total, total, "")
    return count


def check_same(name: str, ours: Value, theirs: Value, target: str, reference: str) -> None:
    """TpvcError, which names the first number that differs."""
    if tuple(ours.shape) != tuple(theirs.shape):
        raise TpvcError(
            f"'{target}' holds '{name}' of shape {list(theirs.shape)}, '{reference}' of {list(ours.shape)}; they are"
            " different models"
        )
    if isinstance(theirs, QTensor):
        if not isinstance(ours, QTensor):
            raise TpvcError(f"'{target}' holds integers for '{name}', which is in float in '{reference}'")
        if ours.grid.bits != theirs.grid.bits:
            raise TpvcError(
                f"'{target}' holds '{name}' in {theirs.grid.bits} bits, '{reference}' in {ours.grid.bits}; they were"
                " rounded differently"
            )
    for part, place, a, b in _parts(ours, theirs):
        wrong = (a != b).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            where = ", ".join(f"{axis} {i}" for axis, i in zip(place, at, strict=False))
            raise TpvcError(
                f"'{target}' holds {b[at].item():.9g} as the {part} of '{name}' at {where}; '{reference}' holds"
                f" {a[at].item():.9g}"
            )


def _parts(ours: Value, theirs: Value) -> Iterator[tuple[str, tuple[str, ...], torch.Tensor, torch.Tensor]]:
    """(what, names of its axes, numbers here, numbers there)."""
    if not isinstance(theirs, QTensor):
        axes = ("row", "column") if theirs.ndim == 2 else ("index",)
        here = dense(ours) if isinstance(ours, QTensor) else ours
        yield "value", axes, here.to(theirs.dtype), theirs
        return
    yield "code", ("row", "column"), ours.codes, theirs.codes
    groups = math.lcm(ours.scale.shape[1], theirs.scale.shape[1])
    for part in ("scale", "zero"):
        here, there = (_spread(q, part, groups) for q in (ours, theirs))
        name = "zero point" if part == "zero" else part
        yield name, ("row", f"group of {ours.shape[1] // groups} columns"), here, there


def _spread(q: QTensor, part: str, groups: int) -> torch.Tensor:
    """Scales or zero points of every row, [N, groups]."""
    value = getattr(q, part)
    if value is None:
        return torch.full((q.shape[0], groups), 2 ** (q.grid.bits - 1), dtype=torch.uint8)
    return value.expand(q.shape[0], -1).repeat_interleave(groups // value.shape[1], 1)
