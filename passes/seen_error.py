"""The error of a block's output as its readers see it: behind the norms that stand in front of all that reads it.

    seen = w * (y - t) / rms(t)      y, t: rounded and float output of a token; LayerNorm: less their means
    w^2 = mean of w_n^2 / mean(w_n^2) over the norms n of the next blocks that read the stream; w_n: their weights

In the stream of a model some features, and some tokens, are far larger than the others, and norms make up for it: in
Gemma-3 270M one feature of 640 has 80 to 95 % of the square after most blocks, the first token 20 to 270 times that of
another, and the next norm's weight is 0.2 to 3 for the largest feature where its median is 3 to 30. A plain mean square
looks at little else than what the norms divide away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tpvc.compiler.program import NORMS, Node, Program, dense
from tpvc.compiler.verify import ports

REACH = 2
"""Blocks whose norms count. All that follow read what a block yields; one alone did less well on Gemma-3."""
TINY = torch.finfo(torch.float32).tiny
Seen = Callable[[Tensor, Tensor], Tensor]
"""(errors [.., D], the float output [.., D] that they are errors of) -> the errors as they count [.., D]."""


def as_it_is(error: Tensor, target: Tensor) -> Tensor:
    return error


def seen_behind(program: Program, index: int) -> Seen:
    """How errors of what block `index` yields are seen; as they are where no norm reads it (models that norm behind
    their sums), or where those that do multiply by zeros alone."""
    leaving = ports(program, index)[1]
    norms = readers(program, leaving, index + 1)
    if not norms or norms[0].inputs[0] != leaving:
        return as_it_is
    squares = torch.stack([_weight(program, n).square() for n in norms])
    shares = squares / squares.mean(-1, keepdim=True).clamp_min(TINY)  # a norm of zeros shows nothing
    if not shares.any():
        return as_it_is
    weight = shares.mean(0).sqrt()
    return partial(through_norm, weight=weight, eps=norms[0].attrs["eps"], centred=norms[0].op == "layer_norm")


def readers(program: Program, leaving: str, first: int) -> list[Node]:
    """The norms that read the stream, of which `leaving` is the first value, in REACH blocks from block `first` on;
    behind the last block it is the final norm."""
    ahead = [n for n in program.nodes if n.block is not None and first <= n.block < first + REACH]
    stream, found = {leaving}, []
    for node in [*ahead, *(program.epilogue if first + REACH > program.blocks else ())]:
        if node.op == "add" and stream & set(node.inputs):
            stream.add(node.name)
        if node.op in NORMS and node.inputs[0] in stream:
            found.append(node)
    return found


def _weight(program: Program, norm: Node) -> Tensor:
    """What a norm multiplies features by, float32 [D]."""
    return dense(program.params[norm.params["weight"]]) + float(bool(norm.attrs.get("plus_one")))


def through_norm(error: Tensor, target: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
    """What a norm with a weight float32 [D] makes of small errors; what it divides by is the target's alone."""
    if centred:
        error, target = (x - x.mean(-1, keepdim=True) for x in (error, target))
    return error * weight.to(error.device) * torch.rsqrt(target.square().mean(-1, keepdim=True) + eps)


def relative_error(output: Tensor, target: Tensor, seen: Seen = as_it_is) -> float:
    """Squared error over squared target: 0 is exact, 1 is as bad as zeros."""
    error, whole = (seen(x, target).double().square().sum() for x in (output - target, target))
    return float(error / whole.clamp_min(TINY))  # zeros for zeros are exact
