"""Move factors from the features that linears read into the columns of their weights.

Before                                      After
    norm(w) -> q, k, v                          norm(w / s) -> q s, k s, v s
    mul(activation, up) -> down                 mul(activation, up / s) -> down s
    attention(q, k, v) -> o                     attention(q, k, v / s) -> o s      query heads that share v share s

The function of the model in float stays what it is. A few features that are much larger than the others spoil a grid
that all of them share, while a row of a weight in 8 bits has room for a larger column (SmoothQuant, Xiao et al., ICML
2023, arXiv 2211.10438, Eq. 3). Values that something else reads too stay as they are.

The quotient of a norm's weight is rounded to the dtype it is stored in, and s is what that rounding made of it, so that
nothing is lost in 16 bits either (but digits of a layer norm's bias). Matrices are float32 until they are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.program import INPUT_ROUNDERS, NORMS, Lazy, Node, Parameter, Program, dense, linears, read


@dataclass(frozen=True, eq=False)
class Place:
    """A value that can be divided.

    rounder  the node that rounds it
    source   the norm or the linear whose parameters are divided, along their first dimension
    readers  the matrices that are multiplied
    owner    int64 [D]: the row of the source that a feature comes from
    rows     how many the source has
    """

    rounder: Node
    source: Node
    readers: tuple[str, ...]
    owner: Tensor
    rows: int

    @property
    def offset(self) -> int:
        """What is missing in the source's weight as it is stored: Gemma's norms store w - 1."""
        return int(bool(self.source.attrs.get("plus_one")))

    def factors(self, sizes: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
        """s [D] for a value with sizes max|x_j| [D] that these weights [out, D] read: max|x_j|^alpha over
        max|W_j|^(1 - alpha), the geometric mean 1. A feature that was hardly met counts as a tenth of the median: it
        may come louder."""
        large = self._shared(sizes)
        steep = self._shared(torch.stack([w.abs().amax(0) for w in weights]).amax(0))
        power = alpha * large.log2() - (1 - alpha) * steep.log2()
        return (power - power.mean()).exp2()[self.owner.to(sizes.device)]

    def _shared(self, sizes: Tensor) -> Tensor:
        """Positive sizes [D] -> [rows]: the largest of the features that come from a row."""
        rows = torch.zeros(self.rows, device=sizes.device)
        rows = rows.scatter_reduce(0, self.owner.to(sizes.device), sizes, "amax")
        return rows.clamp(min=max(0.1 * rows.median().item(), torch.finfo(torch.float32).tiny))

    def storable(self, program: Program, s: Tensor) -> Tensor:
        """The nearest s [D] by which what is stored can be divided exactly."""
        parameter = program.params[self.source.params["weight"]]
        if self.source.op not in NORMS:
            return s
        weight = dense(parameter).to(s.device) + self.offset
        divided = (weight / s - self.offset).to(parameter.dtype).float() + self.offset
        return torch.where(divided == 0, torch.ones_like(s), weight / divided)


def moved(program: Program, place: Place, s: Tensor) -> Program:
    """The program with s [D], which is storable, moved from the value into its readers."""
    s = s.cpu()
    rows = torch.ones(place.rows).scatter(0, place.owner, s)
    own = place.source.op in NORMS
    changed: dict[str, Parameter] = {}
    for role, name in place.source.params.items():
        dtype = program.params[name].dtype if own else torch.float32
        changed[name] = _scaled(program.params[name], 1 / rows, 0, dtype, place.offset if role == "weight" else 0)
    for name in place.readers:
        changed[name] = _scaled(program.params[name], s, 1, torch.float32)
    return program.with_params(changed)


def places_of(program: Program, index: int) -> dict[str, Place]:
    """The values of block `index` that can be divided, by the name of what rounds them."""
    nodes, found = {n.name: n for n in program.block(index)}, {}
    for rounder in (n for n in nodes.values() if n.op in INPUT_ROUNDERS):
        value = nodes.get(rounder.inputs[0])
        readers = [n for n in nodes.values() if rounder.name in n.inputs]
        if value is None or _readers(nodes, value) != [rounder.name] or linears(readers) != tuple(readers):
            continue
        names = tuple(n.params["weight"] for n in readers)
        source, owner = _source(program, nodes, value, program.params[names[0]].shape[1])
        if source is not None and _unshared(program, (*source.params.values(), *names)):
            rows = program.params[source.params["weight"]].shape[0]
            found[rounder.name] = Place(rounder, source, names, owner, rows)
    return found


def _source(program: Program, nodes: Mapping[str, Node], value: Node, width: int) -> tuple[Node | None, Tensor | None]:
    """(the node whose parameters divide a value of so many features, the row that each of them comes from)."""
    if value.op in NORMS:
        whole = program.params[value.params["weight"]].shape[0] == width
        return (value, torch.arange(width)) if whole else (None, None)
    if value.op == "mul":
        for name in value.inputs:
            if _lone_linear(nodes, name, value):
                return nodes[name], torch.arange(width)
    if value.op == "attention" and _lone_linear(nodes, value.inputs[2], value):
        share = value.attrs["heads"] // value.attrs["kv_heads"]
        rows = torch.arange(width // share).unflatten(0, (value.attrs["kv_heads"], -1))
        return nodes[value.inputs[2]], rows.repeat_interleave(share, 0).flatten()
    return None, None


def _lone_linear(nodes: Mapping[str, Node], name: str, reader: Node) -> bool:
    """Whether `name` is what a linear of the block yields, for nobody but `reader`."""
    return name in nodes and nodes[name].op == "linear" and _readers(nodes, nodes[name]) == [reader.name]


def _readers(nodes: Mapping[str, Node], value: Node) -> list[str]:
    return [n.name for n in nodes.values() if value.name in n.inputs]


def _unshared(program: Program, names: tuple[str, ...]) -> bool:
    return all(sum(name in n.params.values() for n in program.nodes) == 1 for name in names)


def _scaled(parameter: Parameter, factors: Tensor, dimension: int, dtype: torch.dtype, offset: int = 0) -> Lazy:
    """The float parameter, to which `offset` belongs, times `factors` along a dimension, rounded to `dtype` when it is
    read."""

    def make() -> Tensor:
        value = read(parameter).float() + offset
        return (value * factors.view([-1 if d == dimension else 1 for d in range(value.ndim)]) - offset).to(dtype)

    return Lazy(tuple(parameter.shape), dtype, make)
