"""The weight layout of the linear kernels: K-slabs, of which every word is loaded once and used with no shuffles.

A slab is 32/b * SUB input features (rows of K), b bits each, held as SUB rows of 32-bit words, N words a row. Field i
of the word in row r (bits b*i .. b*i + b - 1) is the code of feature `slab * 32/b * SUB + i * SUB + r`. So a tile of
SUB rows of words yields 32/b tiles of codes for consecutive features, in the order in which activations lie in memory.

    bits 2, 4, 8   one plane
    bits 3         a plane of 2 bits and a plane `high` of 1 bit, for the same 256 features of a slab: row r of 8 and
                   field j of `high` are feature j * 8 + r
    bits 5, 6, 7   stored in the plane of 8
    bits 16, 32    a float that was not rounded: the code is its bits, and there is no scale

The last slab is filled up with code 0; kernels read no activations there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, QTensor

SUB = 16
"""Rows of words in a slab, and the depth of one product."""


@dataclass(frozen=True, eq=False)
class Slabs:
    """A matrix [out, in] packed for the kernels: integers, or floats in the dtype that the kernels compute in.

    words   int32 [slabs * SUB, out]
    high    int32 [slabs * SUB / 2, out], or None: the third bit
    scale   [groups, out] in the dtype that the checkpoint has; None for floats
    zero    uint8 [groups, out], or None: symmetric, 2^(bits-1)
    depth   in, without filling
    bits    2, 3, 4 or 8: of the planes together; 16 or 32: floats
    group   input features that share a scale
    middle  the zero point where `zero` is None
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    depth: int
    bits: int
    group: int
    middle: int

    @property
    def width(self) -> int:
        """out."""
        return self.words.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a package stores."""
        held = {"words": self.words, "high": self.high, "scale": self.scale, "zero": self.zero}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


def length(bits: int) -> int:
    """Input features of a slab."""
    return 32 // (2 if bits == 3 else bits) * SUB


def pack(value: QTensor) -> Slabs:
    """Pack an integer matrix. TpvcError where a group is not a multiple of SUB, so that a product would span two."""
    out, depth = value.shape
    group = value.grid.columns(depth)
    if group != depth and group % SUB:
        raise TpvcError(f"groups of {group} columns cannot be packed; expected a multiple of {SUB}, or one per channel")
    bits = value.grid.bits if value.grid.bits <= 4 else 8
    codes = _filled(value.codes, length(bits)).T.to(torch.int64)
    low, high = (codes & 3, _plane(codes >> 2, 1)) if bits == 3 else (codes, None)
    scale = value.scale.expand(out, -1).T.contiguous().to(value.scale_dtype)
    zero = None if value.zero is None else value.zero.expand(out, -1).T.contiguous()
    words = _plane(low, 2 if bits == 3 else bits)
    return Slabs(words, high, scale, zero, depth, bits, group, 2 ** (value.grid.bits - 1))


def pack_floats(value: Tensor) -> Slabs:
    """Pack a matrix [out, in] as it is, in float16, bfloat16 or float32."""
    bits = 8 * value.dtype.itemsize
    codes = value.contiguous().view(torch.int16 if bits == 16 else torch.int32)
    words = _plane((_filled(codes, length(bits)).T.to(torch.int64)) & (2**bits - 1), bits)
    return Slabs(words, None, None, None, value.shape[1], bits, value.shape[1], 0)


def unpack(slabs: Slabs, grid: Grid) -> QTensor:
    """The inverse of `pack`, for a matrix that was on `grid`; a grid per tensor comes back as one per channel."""
    codes = _codes(slabs.words, 2 if slabs.bits == 3 else slabs.bits)
    if slabs.high is not None:
        codes = codes | (_codes(slabs.high, 1) << 2)
    codes = codes[: slabs.depth].T.contiguous().to(torch.uint8)
    zero = None if slabs.zero is None else slabs.zero.T.contiguous()
    kept = grid if grid.group else Grid(grid.bits, -1, grid.symmetric)
    return QTensor(codes, slabs.scale.float().T.contiguous(), zero, kept, slabs.scale.dtype)


def dequantise(slabs: Slabs, dtype: torch.dtype) -> Tensor:
    """What the kernels multiply with, [out, in] in `dtype`: (code - zero) * scale, rounded once.

    The scale is taken to `dtype` first, which changes nothing where the checkpoint has that dtype. Floats are of
    `dtype` already.
    """
    if slabs.scale is None:
        codes = _codes(slabs.words, slabs.bits)[: slabs.depth].T
        codes = codes - ((codes >> (slabs.bits - 1)) << slabs.bits)  # as a signed number
        return codes.to(torch.int16 if slabs.bits == 16 else torch.int32).contiguous().view(dtype)
    group = torch.arange(slabs.depth, device=slabs.words.device) // slabs.group
    exact = integers(slabs).T.float() * slabs.scale.to(dtype).float()[group]
    return exact.to(dtype).T.contiguous()


def integers(slabs: Slabs) -> Tensor:
    """code - zero of an integer matrix, int64 [out, in]."""
    codes = _codes(slabs.words, 2 if slabs.bits == 3 else slabs.bits)
    if slabs.high is not None:
        codes = codes | (_codes(slabs.high, 1) << 2)
    group = torch.arange(slabs.depth, device=codes.device) // slabs.group
    zero = slabs.middle if slabs.zero is None else slabs.zero[group].to(torch.int64)
    return (codes[: slabs.depth] - zero).T


def columns(slabs: Slabs, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix [n, in] in `dtype`, for int64 outputs [n]: an embedding from the head's own copy."""
    picked = {name: tensor[:, outputs] for name, tensor in slabs.tensors.items()}
    return dequantise(replace(slabs, **picked), dtype)


def _filled(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % multiple))


def _plane(codes: Tensor, bits: int) -> Tensor:
    """int64 [K, N] -> int32 words [K * bits / 32, N]; a slab of a 1-bit plane has SUB / 2 rows."""
    rows, fields = SUB if bits > 1 else SUB // 2, 32 // bits
    parts = codes.unflatten(0, (-1, fields, rows))
    shifts = (torch.arange(fields) * bits).view(1, fields, 1, 1)
    words = (parts << shifts).sum(1).flatten(0, 1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _codes(words: Tensor, bits: int) -> Tensor:
    """The inverse: int64 [K, N]."""
    rows, fields = SUB if bits > 1 else SUB // 2, 32 // bits
    parts = words.to(torch.int64).unflatten(0, (-1, 1, rows))
    shifts = (torch.arange(fields) * bits).view(1, fields, 1, 1)
    return ((parts >> shifts) & (2**bits - 1)).flatten(0, 2)
