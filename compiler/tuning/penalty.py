"""The penalty that holds what matters where it was: phi sum_l alpha_l sum_(i in l) Omega_i (theta_i - theta*_i)^2.

Its gradient is written out, D = 2 phi alpha Omega (theta - theta*), and added to that of the task, one protected tensor
after the other; a space passes it on to what is trained (dR/dB = s D A^T, dR/dA = s B^T D for a low-rank update). So
no more than one tensor's dense update is there at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.tuning.log_codes import LogCodes
from tpvc.compiler.tuning.space import Space


@dataclass(frozen=True, eq=False)
class Penalty:
    """anchor  the space's parameters at theta*
    omega   {protected name: Omega}, on the space's device; None: 1 for every element
    alpha   {protected name: coefficient of its layer}; None: 1 for every layer
    """

    anchor: Mapping[str, Tensor]
    omega: Mapping[str, Tensor | LogCodes] | None = None
    alpha: Mapping[str, float] | None = None

    @torch.no_grad()
    def add(self, space: Space, phi: float) -> Tensor:
        """Add the penalty's gradient to those of the space's parameters; returns the penalty over phi, float64 []."""
        total = None
        for name in space.layers:
            moved = space.value(name) - space.value(name, self.anchor)
            weighted = moved * (1.0 if self.alpha is None else self.alpha[name])
            if self.omega is not None:
                own = self.omega[name]
                weighted *= own.dense if isinstance(own, LogCodes) else own
            part = torch.dot(weighted.flatten(), moved.flatten()).double()
            total = part if total is None else total + part
            space.add(name, weighted.mul_(2 * phi))
        return total
