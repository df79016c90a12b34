"""What is learned of one linear: s1, S2 and s3 as logarithms, relative to where they start.

FlexRound (arXiv 2306.00317) has an S2 of the weight's shape. LRQ (arXiv 2407.11534) has one of low rank, so that many
weights share a number and less text is learned by heart:

    log S2 = L U + r2        L [out, rank], U [rank, in], r2 [1, in]; its c2 is what s3 is already
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.program import Grid, QTensor
from tpvc.passes.fake_round import FakeRound, learned_codes
from tpvc.passes.grid import Range, grouped, qtensor


@dataclass(frozen=True, eq=False)
class Factors:
    """One linear while it is learned.

    weight     float32 [out, groups, columns]
    span       the grid it starts on
    log_scale  of span.scale's shape: log s1, 0 at the start
    s2         (log S2,) of the weight's shape, or (L, U, r2)
    log_s3     [out, 1, 1]
    """

    weight: Tensor
    span: Range
    log_scale: Tensor
    s2: tuple[Tensor, ...]
    log_s3: Tensor

    @staticmethod
    def start(weight: Tensor, span: Range, grid: Grid, rank: float = 0, seed: int = 0) -> Factors:
        """All factors 1: the forward pass rounds `weight` [out, in] to nearest on `span`.

        rank  of log S2, as a share of the weight's shorter side; 0: S2 has the weight's shape
        seed  of U, which is random where L is 0; entries of variance 1 / rank
        """
        view = grouped(weight, grid)
        log_scale = torch.zeros_like(span.scale, requires_grad=True)
        s2 = (torch.zeros_like(view),)
        if rank:
            (rows, columns), device = weight.shape, weight.device
            width = max(1, round(rank * min(rows, columns)))
            draw = torch.Generator().manual_seed(seed)
            right = (torch.randn(width, columns, generator=draw) / width**0.5).to(device)
            s2 = (torch.zeros(rows, width, device=device), right, torch.zeros(1, columns, device=device))
        s3 = torch.zeros(view.shape[0], 1, 1, device=weight.device, requires_grad=True)
        return Factors(view, span, log_scale, tuple(t.requires_grad_() for t in s2), s3)

    def log_s2(self) -> Tensor:
        """[out, groups, columns], differentiable."""
        if len(self.s2) == 1:
            return self.s2[0]
        left, right, row = self.s2
        return torch.addmm(row, left, right).view(self.weight.shape)

    def rounded(self, top: int, dtype: torch.dtype) -> Tensor:
        """W_hat [out, in], differentiable in the factors."""
        args = (self.weight, self.log_scale, self.log_s2(), self.log_s3, self.span, top, dtype)
        return FakeRound.apply(*args).flatten(1)

    @torch.no_grad()
    def frozen(self, grid: Grid, dtype: torch.dtype) -> QTensor:
        """Codes and scale of the last forward pass; the factors are gone."""
        factors = (self.log_scale, self.log_s2(), self.log_s3)
        relative, span = learned_codes(self.weight, self.span, *factors, 2**grid.bits - 1, dtype)
        return qtensor(tuple(self.weight.flatten(1).shape), relative, span, grid, dtype)
