"""The error of a block's output as its reader sees it: behind the norm that stands in front of all that reads it.

    seen = w * (y - t) / rms(t)          w: the norm's weight; y, t: rounded and float output of a token

In the stream of a model some features, and some tokens, are far larger than the others, and norms make up for it: in
Gemma-3 270M one feature of 640 has 80 to 95 % of the square, the first token 20 to 270 times that of any other, and the
norms' weights are 0.4 for the large features where their median is 20. A plain mean square looks at little else than
what the next norm divides away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tpvc.compiler.program import NORMS, Program, dense
from tpvc.compiler.verify import ports

Seen = Callable[[Tensor, Tensor], Tensor]
"""(errors [.., D], the float output [.., D] that they are errors of) -> the errors as they count [.., D]."""


def as_it_is(error: Tensor, target: Tensor) -> Tensor:
    return error


def seen_behind(program: Program, index: int) -> Seen:
    """How the norm that reads what block `index` yields shows errors of it; as they are where none does (models that
    norm behind their sums)."""
    leaving = ports(program, index)[1]
    following = program.block(index + 1) if index + 1 < program.blocks else program.epilogue
    norm = next((n for n in following if n.op in NORMS and n.inputs[0] == leaving), None)
    if norm is None:
        return as_it_is
    weight = dense(program.params[norm.params["weight"]]) + float(bool(norm.attrs.get("plus_one")))
    return partial(through_norm, weight=weight, eps=norm.attrs["eps"], centred=norm.op == "layer_norm")


def through_norm(error: Tensor, target: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
    """What a norm with a weight [D] makes of small errors; what it divides by is the target's alone."""
    if centred:
        error, target = (x - x.mean(-1, keepdim=True) for x in (error, target))
    return error * weight.to(error.device) * torch.rsqrt(target.square().mean(-1, keepdim=True) + eps)


def relative_error(output: Tensor, target: Tensor, seen: Seen = as_it_is) -> float:
    """Squared error over squared target: 0 is exact, 1 is as bad as zeros."""
    error, whole = (seen(x, target).double().square().sum() for x in (output - target, target))
    return float(error / whole)
