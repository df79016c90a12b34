"""GGUF's blocks of 32 weights with one scale, as a QTensor: no number changes.

    Q4_0   float16 d, 16 bytes: weight i < 16 in the low half of byte i, weight 16 + i in the high half; (q - 8) d
    Q5_0   float16 d, 4 bytes with the fifth bit of every weight, 16 bytes as above; (q - 16) d
    Q8_0   float16 d, 32 signed bytes; q d

The types Q4_1 and Q5_1 add a float of their own to every block, and the K types round their scales again: neither lies
on a grid with integer zero points, so they are dequantised.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch

from tpvc.compiler.program import Grid, QTensor

BLOCK = 32
Kind = gguf.GGMLQuantizationType
BITS = {Kind.Q4_0: 4, Kind.Q5_0: 5, Kind.Q8_0: 8}


def grid_of(kind: Kind) -> Grid | None:
    """The grid of a type, None for one that is dequantised."""
    return Grid(BITS[kind], BLOCK, True) if kind in BITS else None


def qtensor(data: np.ndarray, kind: Kind) -> QTensor:
    """A matrix of `kind` from its bytes, uint8 [N, bytes of a row]."""
    rows = len(data)
    blocks = data.reshape(rows, -1, gguf.GGML_QUANT_SIZES[kind][1])
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    if kind == Kind.Q8_0:
        codes = blocks[..., 2:] ^ np.uint8(128)  # q + 128 of a signed byte
    else:
        halves = blocks[..., -16:]
        codes = np.concatenate((halves & np.uint8(15), halves >> np.uint8(4)), -1)
    if kind == Kind.Q5_0:
        fifth = np.unpackbits(np.ascontiguousarray(blocks[..., 2:6]), axis=-1, bitorder="little")
        codes = codes | fifth << np.uint8(4)
    codes = torch.from_numpy(np.ascontiguousarray(codes.reshape(rows, -1)))
    return QTensor(codes, torch.from_numpy(scale), None, grid_of(kind), torch.float16)
