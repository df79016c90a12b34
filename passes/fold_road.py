"""Fold a rotation into the float weights before it, so that nothing of it is left at run time.

Before                                      After
    linear(W, b) -> rotate -> readers           linear(R W, R b) -> readers

Fold before rounding: rows of different scales are mixed, which integers cannot do without being rounded again. So
integer weights are refused; leave the `rotate` node there instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tpvc.compiler.adapters.road import Rotation, check_invertible, fold_, unfold_
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Lazy, Node, Parameter, Program, grid_of, read


@dataclass(frozen=True)
class FoldRoad:
    """The pass, for a Program with one adapter. The folded parameters are lazy and float32.

    TpvcError for several adapters, integer weights, weights that another node reads too (tied embeddings), and
    linears whose output is read elsewhere than through the rotation.

    inverse  take out a rotation that was folded in, R^-1 W and R^-1 b; TpvcError where it is singular
    """

    inverse: bool = False

    def __call__(self, program: Program) -> Program:
        if len(program.adapters) != 1:
            names = ", ".join(a.name for a in program.adapters) or "none"
            raise TpvcError(f"folding takes exactly one adapter, found {names}; leave several beside the weights")
        (road,) = program.adapters
        rotates = {n.inputs[0]: n for n in program.nodes if n.op == "rotate"}
        nodes, gone = [], {n.name: n.inputs[0] for n in rotates.values()}
        params = dict(program.params)
        for node in program.nodes:
            if node.op == "rotate":
                for name in node.params.values():
                    del params[name]
                continue
            if node.name in rotates:
                _check(program, node, rotates[node.name])
                params |= self._folded(program, node, road.rotations[node.name])
            nodes.append(replace(node, inputs=tuple(gone.get(v, v) for v in node.inputs)))
        return replace(program, nodes=tuple(nodes), params=params, adapters=())

    def _folded(self, program: Program, node: Node, rotation: Rotation) -> dict[str, Parameter]:
        """R W, and R b where there is a bias (or with the inverse of R), read and folded when asked for."""
        if self.inverse:
            check_invertible(rotation, node.name)

        def lazy(parameter: Parameter) -> Lazy:
            def make() -> torch.Tensor:
                value = read(parameter).to(torch.float32, copy=True)
                matrix = value.view(len(value), -1)
                if self.inverse:
                    unfold_(matrix, rotation, node.name)
                else:
                    fold_(matrix, rotation)
                return value

            return Lazy(tuple(parameter.shape), torch.float32, make)

        return {name: lazy(program.params[name]) for name in node.params.values()}


def _check(program: Program, node: Node, rotate: Node) -> None:
    weight = node.params["weight"]
    if grid_of(program.params[weight]) is not None:
        raise TpvcError(
            f"'{weight}' holds integers, into which a rotation cannot be folded; fold before quantising, or leave the"
            " adapter beside the weights"
        )
    for role, name in node.params.items():
        users = [n.name for n in program.nodes if name in n.params.values() and n.name != node.name]
        if users:
            raise TpvcError(
                f"the {role} of '{node.name}' is shared with '{users[0]}' (tied), which folding would change too;"
                " leave the adapter beside the weights"
            )
    readers = [n.name for n in program.nodes if node.name in n.inputs and n.name != rotate.name]
    if readers:
        raise TpvcError(
            f"the output of '{node.name}' is read by '{readers[0]}' without the rotation, so it cannot be folded in;"
            " leave the adapter beside the weights"
        )
