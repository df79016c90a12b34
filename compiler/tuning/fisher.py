"""The diagonal of the empirical Fisher matrix, the importance of elastic weight consolidation (EWC).

Kirkpatrick et al., arXiv 1612.00796: F_i = mean over samples of g_i^2, with g the gradient of one sample's loss. A
sample is one window or example and its loss the mean over its tokens, so that long and short ones count alike. The
gradient is taken sample by sample; squaring that of a batch would be another quantity. Only protected tensors are
looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.tuning.parallel import Ranks
from tpvc.compiler.tuning.phase import Backward
from tpvc.compiler.tuning.space import Space


def fisher(
    space: Space, see: Callable, samples: int, backward: Backward, ranks: Ranks, progress: Progress = silent
) -> dict[str, Tensor]:
    """F of every protected tensor, float32, over the samples 0 .. samples - 1, which the processes share.

    see       leaves -> what `backward` calls for a (Program, Weight)
    backward  of one process
    """
    found = {name: torch.zeros_like(space.value(name)) for name in space.layers}
    leaves = space.opened()
    for sample in ranks.own(list(range(samples))):
        progress("fisher", sample, samples, "")
        for leaf in leaves.values():
            leaf.grad = None
        backward(see(leaves), [sample])
        for name, total in found.items():
            gradient = space.gradient(leaves, name)
            total.addcmul_(gradient, gradient)
    for leaf in leaves.values():
        leaf.grad = None
    ranks.total(found.values())
    progress("fisher", samples, samples, "")
    return {name: total.div_(samples) for name, total in found.items()}
