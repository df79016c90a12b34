"""Which nodes of a Program go into one ONNX node together. Nothing is built here; the answer is data.

add -> norm                                         one SkipLayerNormalization
linears q, k, v [-> rope] -> attention              one matrix with the rows of q, k, v; rope inside the attention
fused linear -> split q, k, v [-> rope] -> attention   likewise; interleaved rows are put into that order
rotate after such linears                           one rotation of q|k|v; unless rows are put into another order
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tpvc.compiler.program import Node, Program, grid_of


@dataclass(frozen=True)
class Projection:
    """Rows of one matrix that is made of several linears, or of one linear in another order.
    `rotations`: the rotate node behind each of the linears, None where there is none; of one group size."""

    linears: tuple[Node, ...]
    order: torch.Tensor | None = None
    rotations: tuple[Node | None, ...] = ()

    @property
    def group(self) -> int | None:
        """Group size of the rotation that follows, None without one."""
        return next((r.attrs["group"] for r in self.rotations if r is not None), None)


@dataclass(frozen=True)
class AttentionPlan:
    """`rope`: the attributes of the rotation that the attention does itself, or None.
    `projection`: where packed q|k|v come from, or None: they are the values `inputs`."""

    inputs: tuple[str, str, str]
    rope: Mapping | None = None
    projection: Projection | None = None


@dataclass(frozen=True)
class Plan:
    attention: Mapping[str, AttentionPlan]
    skip_norm: Mapping[str, Node]
    absorbed: frozenset[str]


NOTHING = Plan({}, {}, frozenset())


def features(program: Program) -> dict[str, int]:
    """Width of the last dimension of the value of every node that yields features."""
    widths: dict[str, int] = {}
    for node in program.nodes:
        if node.op == "embed":
            widths[node.name] = program.params[node.params["weight"]].shape[1]
        elif node.op == "linear":
            widths[node.name] = program.params[node.params["weight"]].shape[0]
        elif node.op in ("text_ids", "prefix_ids", "prefix_mask", "positions"):
            continue
        elif node.op == "split":
            widths[node.name] = node.attrs["groups"] * (node.attrs["stop"] - node.attrs["start"])
        else:
            widths[node.name] = widths[node.inputs[0]]
    return widths


def head_dim(node: Node, widths: Mapping[str, int]) -> int:
    return widths[node.inputs[0]] // node.attrs["heads"]


def plan(program: Program) -> Plan:
    """Everything that can be fused for ONNX Runtime's own operators."""
    readers = defaultdict(list)
    for node in program.nodes:
        for value in node.inputs:
            readers[value].append(node)
    widths = features(program)
    skip = _skip_norms(program, readers, widths)
    absorbed = {norm.name for norm in skip.values()}
    attention = {}
    for node in program.nodes:
        if node.op == "attention" and head_dim(node, widths) % 8 == 0:
            attention[node.name], gone = _attention(program, node, readers, widths)
            absorbed |= gone
    return Plan(attention, skip, frozenset(absorbed))


def _skip_norms(program: Program, readers: Mapping[str, list[Node]], widths: Mapping[str, int]) -> dict[str, Node]:
    """For every add that a norm over all features reads: the first such norm."""
    found = {}
    for node in program.nodes:
        for reader in readers[node.name] if node.op == "add" else ():
            norm = reader.op in ("rms_norm", "layer_norm")
            if norm and program.params[reader.params["weight"]].shape[0] == widths[node.name]:
                found.setdefault(node.name, reader)
    return found


def _attention(program: Program, node: Node, readers: Mapping, widths: Mapping) -> tuple[AttentionPlan, set[str]]:
    """The plan of one attention node, and the nodes that vanish into it."""
    nodes = {n.name: n for n in program.nodes}
    gone: set[str] = set()
    q, k, v = node.inputs[:3]

    def only_here(value: str) -> Node | None:
        return nodes.get(value) if len(readers[value]) == 1 else None

    rope = None
    turned = only_here(q), only_here(k)
    if all(n is not None and n.op == "rope" for n in turned) and _rotates(*turned, head_dim(node, widths)):
        rope = turned[0].attrs
        gone |= {q, k}
        q, k = turned[0].inputs[0], turned[1].inputs[0]
    sources = [only_here(value) for value in (q, k, v)]
    turns = tuple(n if n is not None and n.op == "rotate" else None for n in sources)
    products = [n if r is None else only_here(r.inputs[0]) for n, r in zip(sources, turns, strict=True)]
    projection = None
    if all(n is not None and n.op == "linear" for n in products) and len({q, k, v}) == 3:
        projection = _side_by_side(program, products, turns, widths)
    elif all(n is not None and n.op == "split" for n in sources) and len({q, k, v}) == 3:
        projection = _cut_from_one(sources, nodes, readers, widths)
    if projection is not None:
        gone |= {q, k, v} | {n.name for n in (*projection.linears, *projection.rotations) if n is not None}
    return AttentionPlan((q, k, v), rope, projection), gone


def _rotates(q: Node, k: Node, width: int) -> bool:
    """GroupQueryAttention on CPU rotates multiples of 16 features of heads that are a multiple of 16 wide."""
    return dict(q.attrs) == dict(k.attrs) and len(q.attrs["inv_freq"]) % 8 == 0 and width % 16 == 0


def _side_by_side(
    program: Program, linears: list[Node], turns: tuple[Node | None, ...], widths: Mapping[str, int]
) -> Projection | None:
    grids = {grid_of(program.params[n.params["weight"]]) for n in linears}
    same_input = len({n.inputs for n in linears}) == 1
    groups = {r.attrs["group"] for r in turns if r is not None}
    whole = len(groups) <= 1 and all(widths[n.name] % group == 0 for group in groups for n in linears)
    return Projection(tuple(linears), None, turns) if same_input and len(grids) == 1 and whole else None


def _cut_from_one(splits: list[Node], nodes: Mapping, readers: Mapping, widths: Mapping):
    source = splits[0].inputs[0]
    linear, turn = nodes.get(source), None
    if linear is not None and linear.op == "rotate" and len(readers[linear.inputs[0]]) == 1:
        linear, turn = nodes.get(linear.inputs[0]), linear
    same = all(n.inputs == (source,) for n in splits) and linear is not None and linear.op == "linear"
    if not same or len(readers[source]) != 3:
        return None
    rows = [torch.arange(widths[source]).unflatten(0, (n.attrs["groups"], -1)) for n in splits]
    order = torch.cat([r[:, n.attrs["start"] : n.attrs["stop"]].flatten() for r, n in zip(rows, splits, strict=True)])
    if torch.equal(order, torch.arange(widths[source])):
        return Projection((linear,), None, (turn,))
    return Projection((linear,), order) if turn is None else None
