"""Fold a low-rank update into the float weights, so that nothing of it is left at run time: W' = W + s B A.

Fold before rounding: an update is far smaller than the steps of an integer grid. Integer weights are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpvc.compiler.adapters.lora import Lora, Update
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Lazy, Program, grid_of, linears, read


@dataclass(frozen=True)
class FoldLora:
    """The pass. The folded parameters are lazy and float32.

    TpvcError for integer weights, and for weights that another node reads too (tied embeddings).
    """

    lora: Lora

    def __call__(self, program: Program) -> Program:
        names = {n.name: n.params["weight"] for n in linears(program.nodes)}
        return program.with_params(
            {names[node]: _folded(program, node, names[node], u) for node, u in self.lora.updates.items()}
        )


def _folded(program: Program, node: str, weight: str, update: Update) -> Lazy:
    parameter = program.params[weight]
    if grid_of(parameter) is not None:
        raise TpvcError(
            f"'{weight}' holds integers, into which an update cannot be folded; fold before quantising, or leave the"
            " adapter beside the weights"
        )
    users = [n.name for n in program.nodes if weight in n.params.values() and n.name != node]
    if users:
        raise TpvcError(
            f"the weight of '{node}' is shared with '{users[0]}' (tied), which folding would change too; leave the"
            " adapter beside the weights"
        )

    def make() -> torch.Tensor:
        return read(parameter).float() + update.dense.cpu()

    return Lazy(tuple(parameter.shape), torch.float32, make)
