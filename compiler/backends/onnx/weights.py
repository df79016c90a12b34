"""Parameters as ONNX initializers: integer matrices in the layouts of the operators that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch

from tpvc.compiler.backends.onnx.graph import Graph
from tpvc.compiler.backends.onnx.matmulnbits import Packed, layout_of, pack, to_bits
from tpvc.compiler.program import QTensor


def stack(matrices: Sequence[QTensor | torch.Tensor], order: torch.Tensor | None = None) -> QTensor | torch.Tensor:
    """The rows of several matrices of one grid below each other, then put into `order`. Changes no number."""
    if len(matrices) == 1 and order is None:
        return matrices[0]
    pick = slice(None) if order is None else order
    if not isinstance(matrices[0], QTensor):
        return torch.cat([m.float() for m in matrices])[pick]

    def rows(part: str) -> torch.Tensor:
        return torch.cat([getattr(m, part).expand(len(m.codes), -1) for m in matrices])[pick]

    grid = replace(matrices[0].grid, group=matrices[0].grid.group or -1)
    zero = None if grid.symmetric else rows("zero")
    return replace(matrices[0], codes=rows("codes"), scale=rows("scale"), zero=zero, grid=grid)


def add_packed(g: Graph, name: str, q: QTensor) -> tuple[Packed, list[ir.Value]]:
    """Write `q` for MatMulNBits; the operator's inputs from the second one on."""
    packed = pack(q)
    values = [g.weight(f"{name}.codes", packed.codes), g.weight(f"{name}.scales", packed.scales)]
    if packed.zeros is not None:
        values.append(g.weight(f"{name}.zeros", packed.zeros))
    return packed, values


def dequantize_linear(g: Graph, name: str, q: QTensor, meets_bytes: bool = False) -> ir.Value:
    """`q` transposed, float32 [K, N], as a DequantizeLinear node over codes stored [K, N].

    Up to 4 bits lie in (u)int4, more in (u)int8; signed without zero points when symmetric. Groups are cut into the
    blocks of MatMulNBits where that is exact, so that ONNX Runtime can fuse the node, and stay as they are otherwise.

    meets_bytes  the other factor is a DequantizeLinear node too, so that ONNX Runtime multiplies integers. On x86
                 processors without VNNI it then adds pairs of uint8 * int8 in 16 bits, which overflow without a word
                 (its option session.x64quantprecision is for that), and uint8 * uint8 in 32: symmetric codes of more
                 than 4 bits are stored as bytes, with their middle as the zero point
    """
    rows, columns = q.shape
    bits = 4 if q.grid.bits <= 4 else 8
    if meets_bytes and bits == 8 and q.zero is None:
        q = replace(q, zero=torch.full(q.scale.shape, 1 << q.grid.bits - 1, dtype=torch.uint8))
    layout = layout_of(q.grid, columns)
    per_row = layout.runs == 1
    block = layout.group if layout.spreads else layout.block
    repeat = 1 if per_row else layout.group // block
    tensors = [_transposed(q.codes, q.grid.bits if q.zero is None else 0)]
    if q.zero is not None:
        tensors.append(_transposed(q.zero.expand(rows, -1).repeat_interleave(repeat, 1), 0))
    scale = np.ascontiguousarray(q.scale.expand(rows, -1).repeat_interleave(repeat, 1).numpy().T)
    signed = q.zero is None
    kind = {(4, True): "INT4", (4, False): "UINT4", (8, True): "INT8", (8, False): "UINT8"}[bits, signed]

    def stored(part: str, array: np.ndarray) -> ir.Value:
        shape = array.shape[1:] if part == "zeros" and per_row else array.shape
        if bits == 4:
            array = to_bits(array.reshape(1, -1).view(np.uint8) & np.uint8(15), 4)
        return g.weight(f"{name}.{part}", array, ir.DataType[kind], shape)

    codes, *zeros = (stored(part, array) for part, array in zip(("codes", "zeros"), tensors, strict=False))
    scales = g.weight(f"{name}.scales", scale[0] if per_row else scale)
    attrs = {"axis": 1} if per_row else {"axis": 0, "block_size": block}
    return g.op("DequantizeLinear", codes, scales, *zeros, name=name, **attrs)


def _transposed(values: torch.Tensor, signed_bits: int) -> np.ndarray:
    """[K, N]: uint8 as it is, or int8 around zero for symmetric codes of `signed_bits` bits."""
    if signed_bits:
        values = (values.to(torch.int16) - (1 << signed_bits - 1)).to(torch.int8)
    return np.ascontiguousarray(values.numpy().T)
