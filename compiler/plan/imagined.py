"""Tensors without memory: work is done on shapes alone, and what it would hold is counted.

The passes that a run will call are called as they are, on torch's fake tensors, which know their shape, dtype and
device and nothing else. So the figures follow from the code that they are about and cannot fall behind it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpvc.compiler.program import Grid, Lazy, Program, QTensor

MAPPED = 32 << 20
"""Bytes from which glibc always takes a piece from the system by itself and hands it back when it is freed."""
SLACK = 0.3
"""What smaller pieces hold beyond their size, in gaps between them: 0.26 to 0.35 of blocks of 3.5 to 17 million weights
while they are learned, when memory was trimmed before (glibc 2.36); without the gaps (MALLOC_MMAP_THRESHOLD_) 0.02."""


@dataclass
class Held:
    """Bytes that live in one memory, and the most that did."""

    large: int = 0
    small: int = 0
    peak: int = 0

    def add(self, count: int) -> None:
        if abs(count) < MAPPED:
            self.small += count
        else:
            self.large += count
        self.peak = max(self.peak, self.large + int((1 + SLACK) * self.small))


@dataclass(eq=False)
class Counter(TorchDispatchMode):
    """Counts every new storage until it is gone, in host memory and on a device, and answers what numbers are asked
    for: 1, true, and not equal."""

    host: Held = field(default_factory=Held)
    device: Held = field(default_factory=Held)

    def __post_init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if function is torch.ops.aten.equal.default:
            return False
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._note(value)
        return out

    def _note(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        key, count = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            held = self.host if value.device.type == "cpu" else self.device
            held.add(count)
            weakref.finalize(storage, self._forget, held, key, count)

    def _forget(self, held: Held, key: int, count: int) -> None:
        held.add(-count)
        self._known.discard(key)


@contextmanager
def imagined() -> Iterator[Counter]:
    """Everything that torch makes in the body is without memory."""
    counter = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        yield counter


def without_weights(program: Program) -> Program:
    """`program` with weights that are imagined when they are read; what was brought beside them stays as it is."""
    lazy = {name: imagine(p) for name, p in program.params.items() if isinstance(p, Lazy)}
    return replace(program, params={**program.params, **lazy})


def imagine(parameter: Lazy, grid: Grid | None = None) -> Lazy:
    """A parameter of the same shape, on `grid` or on its own."""
    shape, dtype, grid = parameter.shape, parameter.dtype, grid or parameter.grid

    def read() -> torch.Tensor | QTensor:
        if grid is None:
            return torch.zeros(shape, dtype=dtype)
        scales = (1, 1) if grid.group == 0 else (shape[0], shape[1] // grid.columns(shape[1]))
        zero = None if grid.symmetric else torch.zeros(scales, dtype=torch.uint8)
        return QTensor(torch.zeros(shape, dtype=torch.uint8), torch.zeros(scales), zero, grid, dtype)

    return Lazy(shape, dtype, read, grid)
