"""Round what linears read: a node between a value and the linears of a block.

Before                                      After
    norm -> q, k, v                             norm -> round_rows -> q, k, v

Linears of one block that read the same value share the node; other readers, such as a residual sum, keep the value as
it is. Products of integers stay products of integers: W8A8, W4A8. The head is left alone. Weights are rounded
afterwards, so that FlexRound learns under rounded activations.

int8, fp8     `round_rows`: every token has a scale of its own, found when it is there (dynamically)
int8-static   `round_tensor`: one scale and zero point for all tokens, which the checkpoint tells; without any the node
              has none yet, and `ease_inputs.py` finds them on calibration text
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import ROW_RANGE
from tpvc.compiler.program import Node, Program

FP8_BITS = 4
"""Weights beyond this many bits, less their zero points, are not whole in float8 e4m3, which has 4 digits."""


STATIC = "int8-static"
KINDS = (*ROW_RANGE, STATIC)


@dataclass(frozen=True)
class RoundActivations:
    """The pass.

    kind     "int8" or "fp8" (e4m3) per token, or "int8-static"
    weights  matrices of the linears that are to read rounded rows; None: of every linear in a block
    grids    (scale, zero point) of what they read, by matrix, for int8-static; None: they are found later
    """

    kind: str
    weights: frozenset[str] | None = None
    grids: Mapping[str, tuple[float, int]] | None = None

    def __call__(self, program: Program) -> Program:
        check_kind(self.kind)
        nodes: list[Node] = []
        made: dict[tuple, str] = {}
        for node in program.nodes:
            if node.op == "linear" and self._chosen(node):
                value, (op, attrs) = node.inputs[0], self._rounding(node.params["weight"])
                key = value, node.block, *attrs.values()
                if key not in made:
                    others = sum(other[:2] == key[:2] for other in made)
                    made[key] = f"{value}.{self.kind.removesuffix('-static')}" + f".{others}" * bool(others)
                    nodes.append(Node(made[key], op, (value,), {}, attrs, node.block))
                node = replace(node, inputs=(made[key],))
            nodes.append(node)
        return replace(program, nodes=tuple(nodes))

    def _chosen(self, node: Node) -> bool:
        return node.block is not None if self.weights is None else node.params["weight"] in self.weights

    def _rounding(self, weight: str) -> tuple[str, dict]:
        """(op, attributes) of the node that the linear of this matrix reads."""
        if self.kind != STATIC:
            return "round_rows", {"kind": self.kind}
        scale, zero = (None, 0) if self.grids is None else self.grids[weight]
        return "round_tensor", {"scale": scale, "zero": zero}


def check_kind(kind: str, bits: int = FP8_BITS) -> None:
    """TpvcError for an unknown kind, and for fp8 beside weights of more than 4 bits."""
    if kind not in KINDS:
        raise TpvcError(f"activations are to be '{kind}'; expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind == "fp8" and bits > FP8_BITS:
        raise TpvcError(
            f"fp8 activations go with weights of at most {FP8_BITS} bits, whose integers fp8 holds exactly;"
            f" found {bits}, so round activations to int8"
        )
