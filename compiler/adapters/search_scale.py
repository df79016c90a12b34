"""The lambda of a sum of task prompt vectors, searched on validation examples (arXiv 2408.01119, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tpvc.compiler.progress import Progress, silent

SCALES = [i / 20 for i in range(21)]
"""0.00, 0.05, ..., 1.00. The authors' arange(0, 1.05, 0.05) misses the nearest double of seven of them."""
DIGITS = 12
"""Of a mean, so that 0.1 and 0.7 tie with 0.4 and 0.4, whose float sums differ. Shares of examples differ by more."""


@dataclass(frozen=True)
class Search:
    """scale: the lambda that was chosen; table: {"lambda", "exact": one a task, "mean"} of every lambda tried."""

    scale: float
    table: list[dict] = field(default_factory=list)


def search(score: Callable[[float], list[float]], tasks: int, progress: Progress = silent) -> Search:
    """The lambda with the largest unweighted mean of `score(lambda)`, the share of right answers of every task.

    From the smallest up, and strictly larger wins: ties keep the smaller. 1 where no mean is above 0, and for a single
    task, which needs no search and is not scored.
    """
    if tasks < 2:
        return Search(1.0)
    table, chosen, best = [], 1.0, 0.0
    for done, scale in enumerate(SCALES):
        progress("search", done, len(SCALES), f"lambda {scale:.2f}")
        exact = score(scale)
        mean = round(math.fsum(exact) / len(exact), DIGITS)
        table.append({"lambda": scale, "exact": exact, "mean": mean})
        if mean > best:
            chosen, best = scale, mean
    progress("search", len(SCALES), len(SCALES), f"lambda {chosen:.2f}")
    return Search(chosen, table)
