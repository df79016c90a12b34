"""Round keys and values as a cache of 8 bits keeps them: a node between either and every attention of a block.

Before                                      After
    rope_k -> attention                         rope_k -> round_heads -> attention
    v      -> attention                         v      -> round_heads -> attention

Every head's vector of every token has a scale of its own, found when it is there, so that there is nothing to
calibrate: the arithmetic of the int8 cache of a Triton package (`kernels/rope_cache.py`), of a given vector bit for
bit. A token reads its own key and value rounded too, as they come from the cache there. Queries stay in float.

Weights are rounded afterwards, so that FlexRound learns under a rounded cache. The keys and values of a folded prompt
are parameters of attention, which no cache holds: they stay in float, there and here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Node, Program

KINDS = ("int8",)


@dataclass(frozen=True)
class RoundCache:
    """The pass. kind: "int8"; TpvcError for another."""

    kind: str = "int8"

    def __call__(self, program: Program) -> Program:
        check_cache(self.kind)
        nodes: list[Node] = []
        attrs = {"head_dim": program.facts.head_dim}
        for node in program.nodes:
            if node.op == "attention" and node.block is not None:
                q, k, v, mask = node.inputs
                names = f"{node.name}.cached_k", f"{node.name}.cached_v"
                pairs = zip(names, (k, v), strict=True)
                nodes += [Node(name, "round_heads", (value,), {}, attrs, node.block) for name, value in pairs]
                node = replace(node, inputs=(q, *names, mask))
            nodes.append(node)
        return replace(program, nodes=tuple(nodes))


def float_cache(program: Program) -> Program:
    """The inverse: keys and values in float."""
    value = {n.name: n.inputs[0] for n in program.nodes if n.op == "round_heads"}
    if not value:
        return program
    kept = (n for n in program.nodes if n.name not in value)
    return replace(program, nodes=tuple(replace(n, inputs=tuple(value.get(v, v) for v in n.inputs)) for n in kept))


def check_cache(kind: str) -> None:
    if kind not in KINDS:
        raise TpvcError(f"keys and values are to be kept in '{kind}'; expected {', '.join(KINDS)}, or none")
