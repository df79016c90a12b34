"""Put features into the order of a matrix's columns: a `reorder` node between a value and linears that read it.

Before                                      After
    norm -> q, k, v                             norm -> reorder -> q, k, v

GPTQ with activation order puts the columns of a matrix into groups by how large their inputs are. Its integers fit a
grid when the columns of a group lie side by side, and the product stays what it is when the features move along.
Linears of one block that read the same value in the same order share the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Node, Program


@dataclass(frozen=True)
class Reorder:
    """orders   {weight of a linear: the column of the old matrix that stands at each place of the new one}"""

    orders: Mapping[str, tuple[int, ...]]

    def __call__(self, program: Program) -> Program:
        nodes: list[Node] = []
        made: dict[tuple, str] = {}
        for node in program.nodes:
            order = self.orders.get(node.params["weight"]) if node.op == "linear" else None
            if order is not None:
                key = node.inputs[0], order, node.block
                if key not in made:
                    made[key] = f"{node.name}.reordered"
                    nodes.append(Node(made[key], "reorder", node.inputs, {}, {"order": order}, node.block))
                node = replace(node, inputs=(made[key],))
            nodes.append(node)
        return replace(program, nodes=tuple(nodes))


def orders(program: Program) -> dict[str, tuple[int, ...]]:
    """{weight of a linear: order of the features that it reads}, for linears that read a `reorder` node."""
    found = {n.name: n.attrs["order"] for n in program.nodes if n.op == "reorder"}
    return {n.params["weight"]: found[n.inputs[0]] for n in program.nodes if n.op == "linear" and n.inputs[0] in found}


def check_order(program: Program, format: str) -> None:
    """TpvcError for a matrix with reordered columns, which only some formats hold."""
    for name in orders(program):
        raise TpvcError(
            f"'{name}' has its columns in groups by activation order (GPTQ's desc_act), which {format} cannot hold;"
            " take --to onnx or gptq"
        )
