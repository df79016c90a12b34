"""Texts in slots: rows of their own length, adapter and prompt, that come and go while others go on.

`admit` puts a text into a free slot and computes its prompt; `decode` takes a token for some of the slots that are in
use; `release` frees one. What computes a pass is given: the references on a CPU (`on_torch.py`) or a GPU (`on_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tpvc.compiler.backends.triton.forward import Batch, Want, turns_of
from tpvc.compiler.backends.triton.model import Model, adapter_id, task_id, task_ids
from tpvc.compiler.errors import TpvcError

CHUNKS = (16, 128)
"""A prompt is computed in pieces of these many tokens, the last one filled up, so that few shapes of kernels do."""
ROWS = (1, 2, 4, 8, 16, 32)
"""Rows of a decoding pass: filled up to the next of these numbers."""


class Compute(Protocol):
    """slots texts of `capacity` tokens; called with a batch, whose tensors lie in main memory."""

    model: Model
    slots: int
    capacity: int

    def __call__(self, batch: Batch, want: Want) -> Tensor | None: ...


@dataclass(frozen=True)
class Draw:
    """How a token is drawn: of the likeliest that hold `top_p` of the probability at `temperature`, above 0, with a
    random number `uniform` in [0, 1)."""

    temperature: float
    top_p: float
    uniform: float


LIKELIEST = Draw(1e-4, 0.0, 0.0)
"""Beside rows that draw: at this temperature nothing but equals of the largest logit is left."""


@dataclass(eq=False)
class Engine:
    """What is in the slots: tokens of each in the cache, its adapter, its task and the tokens of its prompt there."""

    compute: Compute
    lengths: list[int] = field(init=False)
    owners: list[tuple[int, int, int]] = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        slots, context = self.compute.slots, self.model.facts.context_length
        if not 0 < self.compute.capacity <= context:
            raise TpvcError(
                f"a capacity of {self.compute.capacity} tokens was asked of a model with a context of {context};"
                " ask for less, but one at least"
            )
        if not 0 < slots <= ROWS[-1]:
            raise TpvcError(f"{slots} slots were asked for; expected 1 to {ROWS[-1]}")
        self.lengths, self.owners = [0] * slots, [(-1, -1, 0)] * slots
        self.free = list(range(slots))[::-1]

    @property
    def model(self) -> Model:
        return self.compute.model

    def admit(
        self,
        ids: Sequence[int],
        adapter: str | None = None,
        task: str | None = None,
        want: Want = "logits",
        draw: Draw = LIKELIEST,
    ) -> tuple[int, Tensor]:
        """Put a text into a free slot; returns (the slot, logits [vocab] after its last token, or the next token).

        `adapter` and `task` are names of what the package carries. TpvcError where no slot is free, or the text and
        its prompt do not fit.
        """
        (own, wanted, prefix), virtual = self._wanted(adapter, task)
        rest = [*virtual, *ids]
        if not self.free:
            raise TpvcError(f"all {len(self.lengths)} slots are in use; release one, or make an engine with more")
        room = min(self.compute.capacity, self.model.facts.context_length - prefix)
        if not ids or not 0 < len(rest) <= room:
            raise TpvcError(f"the prompt has {len(rest)} tokens; expected 1 to {room}")
        slot = self.free.pop()
        self.lengths[slot], self.owners[slot] = 0, (own, wanted, prefix)
        while rest:
            size = next((c for c in CHUNKS if c >= len(rest)), CHUNKS[-1])
            part, rest = rest[:size], rest[size:]
            tokens = [[*part, *[0] * (size - len(part))]]
            found = self._pass([slot], tokens, len(part), "nothing" if rest else want, [draw])
        return slot, found[0]

    def _wanted(self, adapter: str | None, task: str | None) -> tuple[tuple[int, int, int], list[int]]:
        """(what owns a slot, the virtual tokens that stand before its text there)."""
        own, wanted = adapter_id(self.model, adapter), task_id(self.model, task)
        if wanted >= 0 and (own >= 0 or not self.model.prefixes):  # the adapter turns the virtual tokens too
            return (own, -1, 0), task_ids(self.model, wanted)
        return (own, wanted, 0 if wanted < 0 else self.model.tasks[wanted].tokens), []

    def holds(self, adapter: str | None = None, task: str | None = None) -> int:
        """Tokens of a text that a slot can hold, with those that are to follow it. TpvcError for unknown names."""
        (_, _, prefix), virtual = self._wanted(adapter, task)
        return min(self.compute.capacity, self.model.facts.context_length - prefix) - len(virtual)

    def decode(
        self, slots: Sequence[int], tokens: Sequence[int], want: Want = "logits", draws: Sequence[Draw] = ()
    ) -> Tensor:
        """A token more for each of some slots in use -> logits [len(slots), vocab], or the next tokens."""
        for slot in slots:
            self._check_used(slot)
            if self.lengths[slot] >= self.room(slot):
                raise TpvcError(f"slot {slot} is full: it holds {self.lengths[slot]} tokens; release it")
        if len(set(slots)) != len(slots) or len(tokens) != len(slots) or not slots:
            raise TpvcError(f"{len(slots)} slots and {len(tokens)} tokens were given; expected a token for each slot")
        return self._pass(list(slots), [[int(t)] for t in tokens], 1, want, draws or [LIKELIEST] * len(slots))

    def room(self, slot: int) -> int:
        """Tokens that a slot in use can hold."""
        return min(self.compute.capacity, self.model.facts.context_length - self.owners[slot][2])

    def release(self, slot: int) -> None:
        self._check_used(slot)
        self.lengths[slot] = 0
        self.free.append(slot)

    def _check_used(self, slot: int) -> None:
        if slot in self.free or not 0 <= slot < len(self.lengths):
            raise TpvcError(f"slot {slot} is not in use")

    def _pass(self, slots: list[int], tokens: list[list[int]], real: int, want: Want, draws: Sequence[Draw]) -> Any:
        """Rows that fill up have no tokens before or after, so nothing of them is kept."""
        count, size = len(slots), len(tokens[0])
        rows = next(n for n in ROWS if n >= count)
        extra = rows - count
        start = [self.lengths[s] for s in slots]
        owners = [self.owners[s] for s in slots] + [(-1, -1, 0)] * extra
        places = [[at + owner[2] + i for i in range(size)] for at, owner in zip(start, owners, strict=False)]
        last = self.model.facts.context_length - 1
        adapters = torch.tensor([owner[0] for owner in owners])
        whole = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
        chosen = [*draws, *[LIKELIEST] * extra]
        batch = Batch(
            whole([*tokens, *[[0] * size] * extra]),
            whole([*places, *[[0] * size] * extra]).clamp(max=last),
            whole([*slots, *[0] * extra]),
            whole([*start, *[0] * extra]),
            whole([*(at + real for at in start), *[0] * extra]),
            whole([row * size + real - 1 for row in range(rows)]),
            {own: whole((*own, -1))[adapters].repeat_interleave(size) for own in turns_of(self.model)},
            whole([owner[1] for owner in owners]),
            *(
                torch.tensor([getattr(d, name) for d in chosen], dtype=torch.float32)
                for name in ("temperature", "top_p", "uniform")
            ),
        )
        found = self.compute(batch, want)
        for slot, at in zip(slots, start, strict=True):
            self.lengths[slot] = at + real
        return None if found is None else found[:count]
