"""Dense bit packing of integer codes: one layout for every width, with an exact inverse.

Codes of `bits` bits are laid end to end along a row, the first code in the lowest bits, and every row is padded with
zeros to whole 32-bit words. This is the layout of compressed-tensors' `weight_packed`; transposed it is GPTQ's
`qweight`, and its bytes are the ones MatMulNBits reads when a row is a whole number of blocks.

Eight codes fill exactly `bits` bytes, so eight codes are gathered in one 64-bit word and its low `bits` bytes are kept.
"""

from __future__ import annotations

import numpy as np
import torch

_CHUNK = 1 << 22
"""Codes handled at a time: the working memory is a few bytes for each of them, whatever the size of the matrix."""


def words(columns: int, bits: int) -> int:
    """32-bit words that a row of `columns` codes takes."""
    return -(-columns * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, k] with values 0 .. 2^bits - 1 -> int32 [n, ceil(k * bits / 32)]. bits 1..8; ValueError otherwise."""
    source = _checked(codes, bits)
    n, k = source.shape
    out = np.zeros((n, 4 * words(k, bits)), np.uint8)
    for rows in _row_chunks(n, k):
        part = source[rows]
        if k % 8:
            part = np.pad(part, ((0, 0), (0, -k % 8)))
        eights = part.reshape(part.shape[0], -1, 8)
        word = np.zeros(eights.shape[:2], "<u8")
        for j in range(8):
            word |= eights[..., j].astype("<u8") << np.uint64(bits * j)
        stream = word.view(np.uint8).reshape(*word.shape, 8)[..., :bits].reshape(part.shape[0], -1)
        width = min(stream.shape[1], out.shape[1])
        out[rows, :width] = stream[:, :width]
    return torch.from_numpy(out.view("<i4"))


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 [n, ceil(columns * bits / 32)] -> uint8 [n, columns]: undoes `pack`. ValueError on a wrong width."""
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != words(columns, bits):
        raise ValueError(
            f"packed codes are {packed.dtype} {tuple(packed.shape)}, "
            f"expected int32 [n, {words(columns, bits)}] for {columns} columns of {bits} bits"
        )
    source = packed.contiguous().cpu().numpy().view(np.uint8)
    n = source.shape[0]
    out = np.empty((n, columns), np.uint8)
    eights = -(-columns // 8)
    mask = np.uint64(2**bits - 1)
    for rows in _row_chunks(n, columns):
        part = source[rows, : eights * bits]
        if part.shape[1] < eights * bits:
            part = np.pad(part, ((0, 0), (0, eights * bits - part.shape[1])))
        wide = np.zeros((part.shape[0], eights, 8), np.uint8)
        wide[..., :bits] = part.reshape(part.shape[0], eights, bits)
        word = wide.view("<u8")[..., 0]
        codes = np.empty_like(wide)
        for j in range(8):
            codes[..., j] = (word >> np.uint64(bits * j)) & mask
        out[rows] = codes.reshape(part.shape[0], -1)[:, :columns]
    return torch.from_numpy(out)


def _checked(codes: torch.Tensor, bits: int) -> np.ndarray:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, expected 1..8")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}, expected a uint8 matrix")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, which does not fit in {bits} bits")
    return codes.contiguous().cpu().numpy()


def _row_chunks(n: int, k: int) -> list[slice]:
    step = max(1, _CHUNK // max(k, 1))
    return [slice(i, i + step) for i in range(0, n, step)]
