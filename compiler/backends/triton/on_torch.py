"""A model's passes in torch: through the references of its kernels, on a CPU, or through the kernels themselves where
torch's tensors will do for them (Triton's interpreter)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tpvc.compiler.backends.triton.forward import Batch, Pass, Tiles, Want, forward, tables
from tpvc.compiler.backends.triton.model import Model
from tpvc.kernels.launch import Run
from tpvc.kernels.rope_cache import Cache, Rotary


def caches_of(model: Model, slots: int, capacity: int, device: str = "cpu") -> list[Cache]:
    """Empty ones, by layer, for `slots` texts of `capacity` tokens."""
    found = []
    for step in (step for step in model.steps if step.op == "attend"):
        shape = (slots, step.attrs["kv_heads"], capacity, model.facts.head_dim)
        parts = [torch.zeros(shape, dtype=model.cache, device=device) for _ in range(2)]
        if model.cache == torch.int8:
            parts += [torch.zeros(shape[:3], dtype=torch.float32, device=device) for _ in range(2)]
        found.append(Cache(*parts))
    return found


@dataclass(eq=False)
class OnTorch:
    """slots  texts at a time; capacity: tokens of each; run: how kernels are launched, None for their references"""

    model: Model
    slots: int
    capacity: int
    run: Run | None = None
    tiles: Tiles = field(default_factory=dict)
    caches: list[Cache] = field(init=False)
    tables: dict[str, Rotary] = field(init=False)
    floats: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.caches = caches_of(self.model, self.slots, self.capacity)
        self.tables = tables(self.model, self.model.facts.context_length)

    @torch.no_grad()
    def __call__(self, batch: Batch, want: Want) -> Tensor | None:
        """float32 logits [B, vocab], int64 tokens [B], or None."""
        now = Pass(self.model, batch, self.caches, self.tables, self.run, self.tiles, self.floats)
        found = forward(now, want)
        return found.float() if want == "logits" else found
