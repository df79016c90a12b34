"""How important every trained element is for general text: the path integral of its share in the loss drop.

Song et al., arXiv 2501.13669, in our reading (docs/finetune.md). While the model learns general text, step s moves the
elements by what the optimiser really did, and

    omega_i = - sum over s of  g_i^(s) (theta_i^(s+1) - theta_i^(s))

with g the gradient of the task's loss alone, unclipped, of the batch of the step. To first order the sum over all i is
the loss drop on the batches that were seen. Behind a general task with total movement Delta,

    Omega_i = max(omega_i, 0) / (Delta_i^2 + xi),    xi = C mean(Delta^2) over the tensor

which for a quadratic loss is half its curvature, wherever it was begun. Several tasks add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning.space import Space

C = 0.1
"""xi as a share of the mean squared movement of a tensor. It decides what an element counts that came back."""


@torch.no_grad()
def record(omega: Mapping[str, Tensor], space: Space, gradients: Mapping[str, Tensor], before: Mapping[str, Tensor]):
    """Add one step to `omega`, float32 of the protected tensors' shapes, in place; a tensor at a time.

    gradients  dL/d(value) of every protected tensor, of the step's batch
    before     the space's parameters before the step; they stand in the space as the step left them
    """
    for name, total in omega.items():
        moved = space.value(name) - space.value(name, before)
        total.addcmul_(gradients[name].float(), moved, value=-1)


@dataclass(frozen=True)
class Clamped:
    """What was negative in omega, and is counted as 0: how many elements, and their sum; of `total`, the sum of all."""

    elements: int
    mass: float
    total: float


@torch.no_grad()
def importance(omega: Tensor, moved: Tensor, c: float = C) -> tuple[Tensor, Clamped]:
    """Omega of one tensor, float32, at least 0 and finite: 0 everywhere where nothing moved."""
    if not c > 0:
        raise TpvcError(f"xi is {c:g} of the mean squared movement; expected a share above 0")
    negative = omega < 0
    told = Clamped(int(negative.sum()), float(omega[negative].double().sum()), float(omega.double().sum()))
    squared = moved.double().square()
    xi = c * squared.mean()
    if not xi > 0:
        return torch.zeros_like(omega), told
    return (omega.double().clamp(min=0) / (squared + xi)).float(), told
