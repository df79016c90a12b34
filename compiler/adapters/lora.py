"""LoRA, low-rank adaptation (Hu et al., arXiv 2106.09685): its algebra, and nothing else.

An adapted linear yields `y = x W^T + s (x A^T) B^T`, so that its weight is in effect `W + U` with the update

    U = s B A          A [r, in], B [out, r], s = alpha / r

Many pairs mean one U (B -> B Q, A -> Q^-1 A for any invertible Q [r, r]), which is why importance and penalties are
taken of U and never of the factors. With G = dL/dU the chain rule gives dL/dB = s G A^T and dL/dA = s B^T G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError


@dataclass(frozen=True, eq=False)
class Update:
    """Of one linear: a float32 [r, in], b float32 [out, r], and the scale s."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def dense(self) -> Tensor:
        """U, float32 [out, in]."""
        return self.scale * (self.b @ self.a)


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter: an update for some linears of a model, by the name of the linear node; `alpha` is s r."""

    name: str
    rank: int
    alpha: float
    updates: Mapping[str, Update]

    @property
    def trainables(self) -> int:
        return sum(u.a.numel() + u.b.numel() for u in self.updates.values())


def fresh(rank: int, out: int, in_: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B of an update of zero, as PEFT begins: A uniform within 1 / sqrt(in), B zero; float32."""
    if not 0 < rank <= min(out, in_):
        raise TpvcError(f"rank is {rank}, for a weight of {out}x{in_}; expected 1 to {min(out, in_)}")
    return (torch.rand(rank, in_, generator=generator) * 2 - 1) / math.sqrt(in_), torch.zeros(out, rank)
