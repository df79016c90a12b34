"""How much more one layer's penalty counts than another's: a softmax over the norms of their importance.

The paper takes softmax(||Omega_l||), which is one-hot as soon as norms differ by a few units: of norms from 80 to 150
one layer gets everything. That is RAW. NORMALISED, the default, is our reading: the root mean square of every layer's
importance, divided by the mean of them all, softmax, times the number of layers, so that the mean coefficient is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError

NORMALISED, RAW = "normalised", "raw"
KINDS = (NORMALISED, RAW)


def coefficients(kind: str, norms: Tensor, counts: Tensor) -> Tensor:
    """alpha, float32 [L]: mean 1 (normalised), or sum 1 (raw).

    norms   float64 [L], ||Omega_l||_2 over all protected elements of a layer, before Omega is normalised
    counts  [L], how many elements these are
    """
    if kind not in KINDS:
        raise TpvcError(f"layer coefficients are '{kind}'; expected one of {', '.join(KINDS)}")
    norms = norms.double()
    if kind == RAW:
        return norms.softmax(0).float()
    sizes = norms / counts.double().sqrt()
    mean = sizes.mean()
    scaled = sizes / mean if mean > 0 else torch.zeros_like(sizes)
    return (scaled.softmax(0) * len(norms)).float()
