"""A pass as a list of launches with addresses: recorded once on tensors without memory, then carried out as it stands.

What a pass makes on the way shares one piece of memory, its arena: a value's place is free again after the last launch
that names it. Parameters are recognised as tensors in main memory, everything else by its storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpvc.kernels.driver import Memory
from tpvc.kernels.launch import Launch, Run

ALIGNED = 256
"""Bytes: where values begin. Kernels were promised 16."""


class _OnlyViews(TorchDispatchMode):
    """Nothing may be computed while a pass is recorded: a tensor without memory would hide it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = ("view", "alias", "slice", "select", "unsqueeze", "expand", "detach", "split_with_sizes")
        makes = ("empty", "new_empty", "empty_like", "empty_strided")
        name = function._schema.name.removeprefix("aten::")
        assert name in views + makes, f"{name} is computed outside a kernel"
        return function(*args, **(kwargs or {}))


def recorded(work: Callable[[Run], Tensor | None]) -> tuple[list[Launch], Tensor | None]:
    """What `work` launches, and what it returns."""
    launches: list[Launch] = []
    with torch.no_grad(), _OnlyViews():
        result = work(launches.append)
    return launches, result


def key_of(tensor: Tensor) -> int:
    """Alike for all views of one piece of memory, as long as it lives."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Arena:
    """size bytes; places {storage: offset}"""

    size: int
    places: Mapping[int, int]


def arena(launches: Sequence[Launch], fixed: Mapping[int, Memory], result: Tensor | None) -> Arena:
    """Where the values of a pass lie that have no memory of their own: first fit, in order of the launches. The result
    is kept to the end."""
    spans: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for at, launch in enumerate(launches):
        for value in launch.args:
            if isinstance(value, Tensor) and value.device.type == "meta" and key_of(value) not in fixed:
                spans.setdefault(key_of(value), [at, at])[1] = at
                sizes[key_of(value)] = -(-value.untyped_storage().nbytes() // ALIGNED) * ALIGNED
    if result is not None:
        spans[key_of(result)][1] = len(launches)
    taken: list[tuple[int, int, int]] = []  # (offset, end, last launch), sorted by offset
    places: dict[int, int] = {}
    for key, (first, last) in sorted(spans.items(), key=lambda item: item[1][0]):
        taken = [piece for piece in taken if piece[2] >= first]
        at = 0
        for offset, end, _ in taken:
            if offset - at >= sizes[key]:
                break
            at = max(at, end)
        places[key] = at
        taken = sorted([*taken, (at, at + sizes[key], last)])
    return Arena(max((places[k] + sizes[k] for k in places), default=0), places)


def placed(launches: Sequence[Launch], memory: Callable[[Tensor], Memory]) -> list[Launch]:
    """The launches with memory in place of tensors."""

    def put(value):
        return memory(value) if isinstance(value, Tensor) else value

    return [replace(launch, args=tuple(map(put, launch.args))) for launch in launches]


def part_of(storage: Memory, tensor: Tensor) -> Memory:
    """A view's part of its storage's memory."""
    width = tensor.element_size()
    return Memory(storage.address + tensor.storage_offset() * width, tensor.numel() * width, tensor.dtype)
