"""How integer weights lie in a GPTQ checkpoint: the tensors of one linear, both ways.

Under `<module>.` stand (N = out, K = in features, g = columns of a group, G = ceil(K / g) groups):

    qweight  int32 [ceil(K * bits / 32), N]   codes, dense along K
    qzeros   int32 [G, ceil(N * bits / 32)]   zero points, dense along N
    scales   float [G, N]
    g_idx    int32 [K]                        the group of every column: k // g, unless columns were reordered

Version 2 stores zero points as they are; version 1 stores them less one. GPTQModel, whose files these are, takes one
from a whole 32-bit word where the width divides 32 (a zero point of 0 borrows from its neighbour), and from every code
modulo 8 where it is 3; adding it back in the same way gives what was meant. Readers that add one to every code get a
zero point of 2^bits instead of 0, so that this writer makes no file of version 1 with one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tpvc.compiler.compressed_tensors_format import Entries
from tpvc.compiler.packing import pack, unpack, words
from tpvc.compiler.program import QTensor

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
"""`checkpoint_format` -> version."""


def entries(shape: tuple[int, int], bits: int, group: int, scale_dtype: torch.dtype) -> Entries:
    """The tensors of one linear by local name; what `to_tensors` returns has exactly these dtypes and shapes."""
    n, k = shape
    groups = -(-k // group)
    return {
        "qweight": (torch.int32, (words(k, bits), n)),
        "qzeros": (torch.int32, (groups, words(n, bits))),
        "scales": (scale_dtype, (groups, n)),
        "g_idx": (torch.int32, (k,)),
    }


def to_tensors(
    q: QTensor, version: int, scale_dtype: torch.dtype, order: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """The linear's tensors by local name; a grid per tensor becomes one per row.

    order  the place of every column of `q` in the checkpoint, where groups were made of columns that lie apart
    ValueError for a scale that is not exact in `scale_dtype`, and for a zero point of 0 in version 1.
    """
    (n, k), bits = q.shape, q.grid.bits
    group = q.grid.columns(k)
    scale = q.scale.expand(n, -1).T.contiguous()
    if not torch.equal(scale.to(scale_dtype).float(), scale):
        raise ValueError(f"scales are not exact in {scale_dtype}")
    zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8) if q.zero is None else q.zero.expand(n, -1).T
    if version == 1 and not zero.all():
        raise ValueError("a zero point is 0, which version 1 cannot hold")
    back = torch.arange(k) if order is None else torch.tensor(order).argsort()
    return {
        "qweight": pack(q.codes[:, back], bits).T.contiguous(),
        "qzeros": pack(zero.contiguous() - (2 - version), bits),
        "scales": scale.to(scale_dtype),
        "g_idx": (back // group).to(torch.int32),
    }


def from_tensors(
    tensors: Mapping[str, torch.Tensor], bits: int, columns: int, version: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes uint8 [N, K], scales float32 [N, G], zero points uint8 [N, G], or None without `qzeros`)."""
    codes = unpack(tensors["qweight"].T.contiguous(), bits, columns).contiguous()
    scale = tensors["scales"].T.float().contiguous()
    if "qzeros" not in tensors:
        return codes, scale, None
    return codes, scale, _zeros(tensors["qzeros"], bits, len(codes), version).T.contiguous()


def _zeros(stored: torch.Tensor, bits: int, rows: int, version: int) -> torch.Tensor:
    """uint8 [G, N]."""
    if version == 2:
        return unpack(stored, bits, rows)
    if 32 % bits:
        return (unpack(stored, bits, rows) + 1) % 2**bits
    ones = pack(torch.ones(1, 32 // bits, dtype=torch.uint8), bits)
    return unpack(stored + ones, bits, rows)  # int32 wraps as the word does
