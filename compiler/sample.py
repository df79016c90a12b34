"""Text that a model writes itself: windows of tokens sampled at temperature 1, for calibration without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.interpret import Cache, finite, from_files, in_memory, logits
from tpvc.compiler.program import Program
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.windows import beginning
from tpvc.passes.block import EXACT

HELD = 2 << 30
"""Bytes of float32 parameters up to which a model is held in memory to sample; a larger one is read every step."""
CACHE = 256 << 20
"""Bytes of keys and values that one batch may fill."""


@torch.no_grad()
def sample(
    program: Program, tokenizer: Any, windows: int, seqlen: int, seed: int, progress: Progress | None = None
) -> Tensor:
    """`windows` windows of `seqlen` tokens, int64, sampled at temperature 1 from one generator seeded with `seed`.
    Activations that are to be rounded are not: the text is that of the model in float.

    Behind what every window begins with (`windows.py`) stands an ordinary token drawn uniformly, which spreads the
    windows over topics; a model that ends its text goes on with another one. Ids that the tokenizer does not know
    (padding rows of the embedding) never occur.
    """
    known = min(len(tokenizer), program.facts.vocab_size)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    ordinary = torch.tensor([i for i in range(known) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    small = sum(4 * torch.Size(p.shape).numel() for p in program.params.values()) <= HELD
    weight = in_memory(program) if small else from_files(program)
    report, drawn = progress or silent, []
    begin = torch.tensor(beginning(tokenizer), dtype=torch.int64)
    batch = batch_size(program, seqlen)
    for first in range(0, windows, batch):
        rows = min(batch, windows - first)
        step = ordinary[torch.randint(len(ordinary), (rows, 1), generator=generator)]
        step = torch.cat((begin.expand(rows, -1), step), 1)
        cache: Cache = {}
        tokens = [step]
        for position in range(step.shape[1], seqlen):
            last = finite(logits(program, step, weight=weight, cache=cache, ops=EXACT)[:, -1, :known])
            step = torch.multinomial(last.softmax(-1), 1, generator=generator)
            tokens.append(step)
            if position % 16 == 0:
                report("sampling", first * seqlen + rows * position, windows * seqlen, "tokens")
        drawn.append(torch.cat(tokens, 1))
    report("sampling", windows * seqlen, windows * seqlen, "tokens")
    return torch.cat(drawn) if drawn else torch.empty(0, seqlen, dtype=torch.int64)


def batch_size(program: Program, seqlen: int) -> int:
    """Windows sampled side by side: 1 to 64, depending on nothing but the model's sizes and the length."""
    facts = program.facts
    each = 2 * facts.layers * facts.kv_heads * facts.head_dim * 4 * seqlen
    return max(1, min(64, CACHE // each))
