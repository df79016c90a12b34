"""Low-rank updates as what is trained. What is protected is the effective update U = s B A, never a factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.adapters.lora import Lora, Update, fresh
from tpvc.compiler.interpret import Weight
from tpvc.compiler.program import Node, Program, dense
from tpvc.passes.bank_lora import BankLora

KIND = "lora"
SCALE = 2.0
"""alpha / r: alpha is twice the rank."""
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, eq=False)
class LoraSpace:
    """See tpvc.compiler.tuning.space. Training runs `program`, in which the factors stand beside the weights. Where
    G = dL/dU is wanted, `plain` runs with the weights W + U and leaves U [out, in], one for every target."""

    program: Program
    plain: Program
    params: dict[str, Tensor]
    layers: dict[str, int]
    scale: float
    adapter: int = -1

    def weight(self, held: Weight, dtype: torch.dtype) -> tuple[Program, Weight]:
        return self.program, lambda name: self.params[name].to(dtype) if name in self.params else held(name)

    @torch.no_grad()
    def value(self, name: str, params: Mapping[str, Tensor] | None = None) -> Tensor:
        own = self.params if params is None else params
        return Update(own[name + A], own[name + B], self.scale).dense

    @torch.no_grad()
    def add(self, name: str, gradient: Tensor) -> None:
        a, b = self.params[name + A], self.params[name + B]
        for p, own in ((b, gradient @ a.T), (a, b.T @ gradient)):
            own *= self.scale
            p.grad = own if p.grad is None else p.grad.add_(own)

    def opened(self) -> dict[str, Tensor]:
        return {name: self.value(name).requires_grad_() for name in self.layers}

    def seen(self, held: Weight, dtype: torch.dtype, leaves: Mapping[str, Tensor]) -> tuple[Program, Weight]:
        own = {n.params["weight"]: leaves[n.name] for n in self.plain.nodes if n.name in leaves}
        return self.plain, lambda name: held(name) + own[name].to(dtype) if name in own else held(name)

    def gradient(self, leaves: Mapping[str, Tensor], name: str) -> Tensor:
        return leaves[name].grad

    def spread(self, leaves: Mapping[str, Tensor]) -> None:
        """The factors' gradients, by the chain rule."""
        for name, leaf in leaves.items():
            self.add(name, leaf.grad)

    def drift(self, name: str) -> tuple[Tensor, Tensor]:
        weight = next(n.params["weight"] for n in self.plain.nodes if n.name == name)
        update = self.value(name)
        return update, dense(self.plain.params[weight]).to(update.device)

    def lora(self, name: str, params: Mapping[str, Tensor]) -> Lora:
        """The adapter that `params` stand for, in host memory."""
        held = {key: value.detach().cpu() for key, value in params.items()}
        updates = {t: Update(held[t + A], held[t + B], self.scale) for t in self.layers}
        rank = next(iter(updates.values())).a.shape[0]
        return Lora(name, rank, self.scale * rank, updates)


def lora_space(program: Program, targets: Sequence[Node], rank: int, seed: int, device: str) -> LoraSpace:
    """Updates of zero for the linears `targets`, A drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n.name: program.params[n.params["weight"]].shape for n in targets}
    updates = {name: Update(*fresh(rank, *shape, generator), SCALE) for name, shape in shapes.items()}
    params = {}
    for name, update in updates.items():
        params |= {name + A: update.a, name + B: update.b}
    params = {name: value.to(device).requires_grad_() for name, value in params.items()}
    banked = BankLora(Lora("tuned", rank, SCALE * rank, updates))(program)
    return LoraSpace(banked, program, params, {n.name: n.block for n in targets}, SCALE)
