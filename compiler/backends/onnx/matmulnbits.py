"""QTensor <-> the arrays of ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`; a pure function and its inverse.

The operator knows codes of 2, 4 and 8 bits in blocks of 16, 32, 64 or 128 columns. Everything else is carried over
without changing a single number, because `(q - zero) * scale` is all that counts:

    bits    3 -> 4 and 5, 6, 7 -> 8. Asymmetric codes and zero points stay as they are; symmetric codes are shifted so
            that their implicit zero point 2^(bits-1) lands on the container's.
    groups  a group is cut into equal blocks that repeat its scale and zero point. A group that 16 does not divide is
            filled up with columns that weigh nothing, and the input of the matrix gets zeros at the same places.

Layouts whose kernel is missing on CPU, so that ORT would dequantise all of the matrix on every call, are never made:
float zero points, g_idx, and 2-bit blocks of 16 (measured 100 times slower than blocks of 32; they go to 4 bits).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tpvc.compiler.program import Grid, QTensor

BLOCKS = (128, 64, 32, 16)
CONTAINER = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
SLOWEST_2_BIT_BLOCK = 32
FINE_8_BIT_BLOCK = 64


@dataclass(frozen=True)
class Layout:
    """How a matrix of `runs * group` columns lies in blocks.

    bits    of the container: 2, 4 or 8
    block   columns that share a scale in the operator
    runs    groups of a row that have their own scale in the source
    group   columns of a run
    padded  columns of a run once filled up, a multiple of `block`
    """

    bits: int
    block: int
    runs: int
    group: int
    padded: int

    @property
    def columns(self) -> int:
        """K of the operator. A single run may end inside a block; the operator fills that up by itself."""
        return self.group if self.runs == 1 else self.runs * self.padded

    @property
    def blocks(self) -> int:
        return self.runs * self.padded // self.block

    @property
    def spreads(self) -> bool:
        """True when the input must be spread over `runs * padded` columns first."""
        return self.runs > 1 and self.padded != self.group


@dataclass(frozen=True, eq=False)
class Packed:
    """codes uint8 [N, blocks, block * bits / 8]; scales float32 [N, blocks]; zeros uint8 [N, ceil(blocks * bits / 8)]
    or None for 2^(bits-1) everywhere."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    layout: Layout


def layout_of(grid: Grid, columns: int) -> Layout:
    """The layout for a matrix with `columns` columns: the largest block that divides the group; where none does, or a
    row has one scale and any block is exact, the one that takes the fewest bytes.

    At accuracy level 4 activations are rounded per block. 8-bit rows with one scale therefore get blocks of 64: finer
    than the quickest, 128, by 4 % of the time of the demo model's head; blocks of 32 would take 14 %.
    """
    group = grid.columns(columns)
    runs = columns // group
    bits = CONTAINER[grid.bits]
    if bits == 2 and runs > 1 and group % SLOWEST_2_BIT_BLOCK:
        bits = 4
    sizes = [b for b in BLOCKS if bits > 2 or b >= SLOWEST_2_BIT_BLOCK]
    if bits == 8 and runs == 1:
        sizes = [FINE_8_BIT_BLOCK]
    exact = [b for b in sizes if group % b == 0] if runs > 1 else []
    block = exact[0] if exact else min(sizes, key=lambda b: _ceil(group, b) * bits + _ceil(group, b) // b * 32)
    return Layout(bits, block, runs, group, _ceil(group, block))


def pack(q: QTensor) -> Packed:
    """The operator's arrays for `q`."""
    rows, columns = q.shape
    layout = layout_of(q.grid, columns)
    repeat = layout.padded // layout.block
    runs = (rows, layout.runs)
    scale = np.broadcast_to(q.scale.numpy(), runs)
    codes = q.codes.numpy().reshape(rows, layout.runs, layout.group)
    if q.zero is None:
        half = 1 << layout.bits - 1
        codes = codes + np.uint8(half - (1 << q.grid.bits - 1))
        filler, zeros = np.full((*runs, 1), half, np.uint8), None
    else:
        zero = np.broadcast_to(q.zero.numpy(), runs)
        filler = zero[..., None]
        zeros = None if (zero == 1 << layout.bits - 1).all() else to_bits(np.repeat(zero, repeat, 1), layout.bits)
    if layout.padded != layout.group:
        fill = np.broadcast_to(filler, (*runs, layout.padded - layout.group))
        codes = np.concatenate((codes, fill), -1)
    codes = to_bits(codes.reshape(rows, -1), layout.bits).reshape(rows, layout.blocks, -1)
    return Packed(codes, np.repeat(scale, repeat, 1).astype(np.float32), zeros, layout)


def unpack(packed: Packed, grid: Grid) -> QTensor:
    """The inverse of `pack` for a source with this grid. A per-tensor source comes back with a scale per row."""
    layout, rows = packed.layout, len(packed.codes)
    repeat = layout.padded // layout.block
    codes = from_bits(packed.codes.reshape(rows, -1), layout.bits, layout.runs * layout.padded)
    codes = codes.reshape(rows, layout.runs, layout.padded)[..., : layout.group].reshape(rows, -1)
    half = 1 << layout.bits - 1
    zero = None
    if grid.symmetric:
        codes = codes - np.uint8(half - (1 << grid.bits - 1))
    elif packed.zeros is None:
        zero = np.full((rows, layout.runs), half, np.uint8)
    else:
        zero = from_bits(packed.zeros, layout.bits, layout.blocks)[:, ::repeat]
    scale = packed.scales[:, ::repeat]
    tensors = (None if a is None else torch.from_numpy(np.array(a)) for a in (codes, scale, zero))
    return QTensor(*tensors, grid)


def to_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, k] below 2^bits -> uint8 [n, ceil(k * bits / 8)]; lowest bits first, every row filled up to a byte."""
    per = 8 // bits
    if per == 1:
        return np.ascontiguousarray(values)
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per)))
    out = values[:, ::per].copy()
    for i in range(1, per):
        out |= values[:, i::per] << np.uint8(i * bits)
    return out


def from_bits(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of `to_bits`: uint8 [n, columns]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = packed[..., None] >> shifts & np.uint8((1 << bits) - 1)
    return values.reshape(len(packed), -1)[:, :columns]


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
