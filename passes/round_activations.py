"""Round what linears read, token by token: a `round_rows` node between a value and the linears of a block.

Before                                      After
    norm -> q, k, v                             norm -> round_rows -> q, k, v

Linears of one block that read the same value share the node; other readers, such as a residual sum, keep the value as
it is. The scale of a row is found when it is there (dynamically), so there is nothing to calibrate, and products of
integers stay products of integers: W8A8, W4A8. The head is left alone. Weights are rounded afterwards, so that
FlexRound learns under rounded activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import ROW_RANGE
from tpvc.compiler.program import Node, Program

FP8_BITS = 4
"""Weights beyond this many bits, less their zero points, are not whole in float8 e4m3, which has 4 digits."""


@dataclass(frozen=True)
class RoundActivations:
    """The pass.

    kind     "int8", or "fp8" (e4m3)
    weights  matrices of the linears that are to read rounded rows; None: of every linear in a block
    """

    kind: str
    weights: frozenset[str] | None = None

    def __call__(self, program: Program) -> Program:
        check_kind(self.kind)
        nodes: list[Node] = []
        made: set[tuple[str, int | None]] = set()
        for node in program.nodes:
            if node.op == "linear" and self._chosen(node):
                value = node.inputs[0]
                name = f"{value}.{self.kind}"
                if (name, node.block) not in made:
                    made.add((name, node.block))
                    nodes.append(Node(name, "round_rows", (value,), {}, {"kind": self.kind}, node.block))
                node = replace(node, inputs=(name,))
            nodes.append(node)
        return replace(program, nodes=tuple(nodes))

    def _chosen(self, node: Node) -> bool:
        return node.block is not None if self.weights is None else node.params["weight"] in self.weights


def check_kind(kind: str, bits: int = FP8_BITS) -> None:
    """TpvcError for an unknown kind, and for fp8 beside weights of more than 4 bits."""
    if kind not in ROW_RANGE:
        raise TpvcError(f"activations are to be '{kind}'; expected {' or '.join(ROW_RANGE)}")
    if kind == "fp8" and bits > FP8_BITS:
        raise TpvcError(
            f"fp8 activations go with weights of at most {FP8_BITS} bits, whose integers fp8 holds exactly;"
            f" found {bits}, so round activations to int8"
        )
