"""RoAd adapters as what is trained: theta and alpha of every target, which are protected as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.interpret import Weight
from tpvc.compiler.program import Node, Program
from tpvc.compiler.tuning import road

KINDS = ("road_1", "road_2", "road_4")


@dataclass(frozen=True, eq=False)
class RoadSpace:
    """See tpvc.compiler.tuning.space. `places` says where a protected `<target>.road_theta` or `.road_alpha` lies in
    the trainee's parameters, which are one long vector of each: (theta or alpha, first, behind the last)."""

    trained: road.Trainee
    layers: dict[str, int]
    places: dict[str, tuple[str, int, int]]
    adapter: int = 0

    @property
    def program(self) -> Program:
        return self.trained.program

    @property
    def params(self) -> dict[str, Tensor]:
        return self.trained.params

    def weight(self, held: Weight, dtype: torch.dtype) -> tuple[Program, Weight]:
        return self.program, self.trained.weight(held)

    def value(self, name: str, params: Mapping[str, Tensor] | None = None) -> Tensor:
        key, first, last = self.places[name]
        return (self.params if params is None else params)[key].detach()[first:last]

    def add(self, name: str, gradient: Tensor) -> None:
        key, first, last = self.places[name]
        self.params[key].grad[first:last].add_(gradient)

    def opened(self) -> dict[str, Tensor]:
        return self.params

    def seen(self, held: Weight, dtype: torch.dtype, leaves: Mapping[str, Tensor]) -> tuple[Program, Weight]:
        return self.weight(held, dtype)

    def gradient(self, leaves: Mapping[str, Tensor], name: str) -> Tensor:
        key, first, last = self.places[name]
        return leaves[key].grad[first:last]

    def spread(self, leaves: Mapping[str, Tensor]) -> None:
        """Nothing: the leaves are the parameters."""

    def drift(self, name: str) -> tuple[Tensor, Tensor]:
        """Against the identity, whose theta 0 and alpha 1 together have the length of alpha."""
        value = self.value(name)
        base = torch.full_like(value, float(name.endswith("alpha")))
        return value - base, base


def road_space(program: Program, targets: Sequence[Node], variant: str, device: str) -> RoadSpace:
    """An identity adapter of `variant` for the linears `targets`, pairs grouped as `tpvc road tune` does."""
    last = sorted({n.name.split(".")[-1] for n in targets})
    trained = road.trainee(program, road.shape(program, variant, None, last, "all"), device)
    blocks, layers, places = {n.name: n.block for n in targets}, {}, {}
    for key in ("theta", "alpha"):
        each = len(trained.params[key]) / sum(trained.features)
        first = 0
        for name, features in zip(trained.shape.targets, trained.features, strict=True):
            behind = first + int(each * features)
            layers[f"{name}.road_{key}"], places[f"{name}.road_{key}"] = blocks[name], (key, first, behind)
            first = behind
    return RoadSpace(trained, layers, places)
