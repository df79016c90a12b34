"""One launch of one kernel, as data, and the simplest way to carry it out.

A wrapper checks its tensors, makes its results and hands one or more `Launch` to `run`. With Triton's JIT (or its
interpreter) that is `with_triton`; the ahead-of-time build records them, and the launcher finds the binary that was
compiled for one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Launch:
    """kernel     "module:function" below tpvc.kernels, as in "linear:slab"
    grid       programs in x, y, z
    args       in the order of the kernel's parameters that are not constexpr: tensors, ints, floats; None for a pointer
               that the kernel does not read
    constants  its constexpr parameters
    warps, stages   num_warps and num_stages

    An integer parameter whose name begins with `n_` varies from call to call. Every other integer, and every pointer,
    is a promise: what is divisible by 16 (an address, a width) when a kernel is compiled stays so.
    """

    kernel: str
    grid: tuple[int, int, int]
    args: tuple[Tensor | int | float | None, ...]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Config:
    """How a large kernel is cut: block_m rows (of attention: queries) and block_n outputs (keys) a program; split
    programs share the depth (the keys); warps and pipeline stages."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int


Run = Callable[[Launch], None]


def body(kernel: str) -> Any:
    """The Triton function that `Launch.kernel` names."""
    module, _, function = kernel.partition(":")
    return getattr(importlib.import_module(f"tpvc.kernels.{module}"), function)


def with_triton(launch: Launch) -> None:
    """Compile if need be and run: on a GPU, or, under TRITON_INTERPRET=1, anywhere."""
    options = {} if _interpreted() else {"num_warps": launch.warps, "num_stages": launch.stages}
    body(launch.kernel)[launch.grid](*launch.args, **launch.constants, **options)


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
