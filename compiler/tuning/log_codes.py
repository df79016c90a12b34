"""Numbers of at least 0 in 8 bits, on a logarithmic scale: what an importance file holds.

    code 0           0
    code 1 .. 255    top 2^((code - 255) / 8)          top: the largest number of the tensor, float32

The step is 2^(1/8), so that a number is off by a factor of at most 2^(1/16), 4.4 %; the smallest is top 2^-31.75, and
what is below it by more than half a step becomes 0. Against half precision it was measured (docs/finetune.md): half the
bytes, and an error of the penalty and its gradient that is far below that of phi.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS, LAST = 8, 255
"""Steps for a factor of 2, and the code of the largest number."""


@dataclass(frozen=True, eq=False)
class LogCodes:
    """codes uint8 of any shape; top float32 [], 0 where all is 0."""

    codes: Tensor
    top: Tensor

    @property
    def dense(self) -> Tensor:
        """float32, on the device of the codes."""
        exponents = (torch.arange(LAST + 1, dtype=torch.float32, device=self.codes.device) - LAST) / STEPS
        table = self.top.to(self.codes.device) * exponents.exp2()
        table[0] = 0
        return table.index_select(0, self.codes.reshape(-1).int()).view(self.codes.shape)


def encode(values: Tensor) -> LogCodes:
    """The nearest codes, in the logarithm, of finite numbers of at least 0; one whose neighbour is 0 is rounded to it
    from half a step below."""
    top = values.max().float() if values.numel() else torch.zeros(())
    if not top > 0:
        return LogCodes(torch.zeros(values.shape, dtype=torch.uint8), torch.zeros(()))
    codes = LAST + torch.round(STEPS * torch.log2(values.double() / top.double()))
    return LogCodes(codes.clamp(min=0).to(torch.uint8).cpu(), top.cpu())
