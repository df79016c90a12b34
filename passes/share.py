"""Which calibration windows a process holds, where several share the work (tpvc.compiler.tuning.parallel).

Windows are dealt out in lots of AT_ONCE, which are computed together wherever they are: what leaves a block for a
window does not depend on the number of processes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tpvc.compiler.tuning.parallel import Ranks
from tpvc.passes.block import AT_ONCE


@dataclass(frozen=True)
class Share:
    """Of so many windows those of this process: lots rank, rank + count, .. in order. Alone it has all of them."""

    ranks: Ranks
    windows: int

    @property
    def own(self) -> list[int]:
        return [i for i in range(self.windows) if self._owner(i) == self.ranks.rank]

    def among(self, first: int) -> int:
        """How many of the first windows of all are this process's; they are the first of its own."""
        return sum(i < first for i in self.own)

    def rows(self, stream: Tensor, indices: Sequence[int]) -> Tensor:
        """Any windows [k, L, D], out of streams of which every process has its share. All must ask for the same."""
        places = [k for k, i in enumerate(indices) if self._owner(i) == self.ranks.rank]
        held = stream[[self._place(indices[k]) for k in places]]
        return self.ranks.joined(held, places, len(indices))

    def _owner(self, index: int) -> int:
        return index // AT_ONCE % self.ranks.count

    def _place(self, index: int) -> int:
        """Where its owner has a window."""
        return index // (AT_ONCE * self.ranks.count) * AT_ONCE + index % AT_ONCE
