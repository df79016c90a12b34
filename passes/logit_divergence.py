"""The divergence of two models' logits and its gradient, in one pass over them.

    KL(softmax(w) || softmax(f)) = sum_v softmax(w)_v (log softmax(w)_v - log softmax(f)_v)
    d KL / d f = softmax(f) - softmax(w)

Where the vocabulary is large, logits are most of what a closing step computes. Left to autograd they are walked over a
dozen times, each time from memory, and several tensors of their size are made. Here a few rows are read once, stay in
the cache until they are done with, and leave their gradient in the place of the wanted logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Logits at a time: 4 MB of float32."""


@torch.no_grad()
def logit_divergence(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over all tokens of KL(softmax(wanted) || softmax(found)) in nats, float32 []; its gradient in `found`).

    Both float32 [..., vocab], `wanted` contiguous: the gradient is `wanted` itself, whose logits are used up.
    """
    vocab = found.shape[-1]
    rows = max(1, CHUNK // vocab)
    total = torch.zeros((), dtype=torch.float64, device=found.device)
    for f, w in zip(found.reshape(-1, vocab).split(rows), wanted.view(-1, vocab).split(rows), strict=True):
        log_f, log_w = f.log_softmax(-1), w.log_softmax(-1)
        chance = log_w.exp()
        total += torch.linalg.vecdot(chance, log_w.sub_(log_f)).sum()
        torch.sub(log_f.exp_(), chance, out=w)
    return total.float(), wanted
