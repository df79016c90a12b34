"""Full weights as what is trained: float32 masters, which the graph sees in the dtype that it computes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.interpret import Weight
from tpvc.compiler.program import Node, Program, dense, grid_of

KIND = "weights"


@dataclass(frozen=True, eq=False)
class WeightSpace:
    """See tpvc.compiler.tuning.space. Protected are the weights [out, in] of `layers`; other parameters, if any are
    trained, move freely."""

    program: Program
    params: dict[str, Tensor]
    layers: dict[str, int]
    adapter: int = -1

    def weight(self, held: Weight, dtype: torch.dtype) -> tuple[Program, Weight]:
        return self.seen(held, dtype, self.params)

    def value(self, name: str, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return (self.params if params is None else params)[name].detach()

    def add(self, name: str, gradient: Tensor) -> None:
        self.params[name].grad.add_(gradient)

    def opened(self) -> dict[str, Tensor]:
        return self.params

    def seen(self, held: Weight, dtype: torch.dtype, leaves: Mapping[str, Tensor]) -> tuple[Program, Weight]:
        return self.program, lambda name: leaves[name].to(dtype) if name in leaves else held(name)

    def gradient(self, leaves: Mapping[str, Tensor], name: str) -> Tensor:
        return leaves[name].grad

    def spread(self, leaves: Mapping[str, Tensor]) -> None:
        """Nothing: the leaves are the parameters."""

    def drift(self, name: str) -> tuple[Tensor, Tensor]:
        base = dense(self.program.params[name]).to(self.params[name].device)
        return self.value(name) - base, base


def weight_space(program: Program, targets: Sequence[Node], everything: bool, device: str) -> WeightSpace:
    """The weights of the linears `targets`, and, with `everything`, all other parameters too, which are not protected.

    TpvcError for integers.
    """
    layers = {n.params["weight"]: n.block for n in targets}
    names = list(program.params) if everything else list(layers)
    for name in names:
        if grid_of(program.params[name]) is not None:
            raise TpvcError(f"'{name}' holds integers, which cannot be trained; train lora or road beside them")
    params = {n: dense(program.params[n]).to(device, copy=True).requires_grad_() for n in names}
    return WeightSpace(program, params, layers)
