"""How 4-bit integer weights lie in an AWQ checkpoint (the layout "gemm"): the tensors of one linear, both ways.

Under `<module>.` stand (N = out, K = in features, G = groups of consecutive columns):

    qweight  int32 [K, N / 8]   codes, packed along N
    qzeros   int32 [G, N / 8]   zero points, packed likewise
    scales   float [G, N]

Eight codes lie in a word, the lowest four bits first, in this order of the rows that they belong to: 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tpvc.compiler.compressed_tensors_format import Entries
from tpvc.compiler.packing import pack, unpack
from tpvc.compiler.program import QTensor

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def entries(shape: tuple[int, int], group: int, scale_dtype: torch.dtype) -> Entries:
    """The tensors of one linear by local name; what `to_tensors` returns has exactly these dtypes and shapes."""
    n, k = shape
    groups = -(-k // group)
    return {
        "qweight": (torch.int32, (k, n // 8)),
        "qzeros": (torch.int32, (groups, n // 8)),
        "scales": (scale_dtype, (groups, n)),
    }


def to_tensors(q: QTensor, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The linear's tensors by local name; a grid per tensor becomes one per row. ValueError for a scale that is not
    exact in `scale_dtype`."""
    n = q.shape[0]
    scale = q.scale.expand(n, -1).T.contiguous()
    if not torch.equal(scale.to(scale_dtype).float(), scale):
        raise ValueError(f"scales are not exact in {scale_dtype}")
    zero = torch.full_like(scale, 8, dtype=torch.uint8) if q.zero is None else q.zero.expand(n, -1).T
    return {"qweight": _interleaved(q.codes.T), "qzeros": _interleaved(zero), "scales": scale.to(scale_dtype)}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes uint8 [N, K], scales float32 [N, G], zero points uint8 [N, G], or None without `qzeros`)."""
    codes, scale = _in_order(tensors["qweight"]).T.contiguous(), tensors["scales"].T.float().contiguous()
    return codes, scale, _in_order(tensors["qzeros"]).T.contiguous() if "qzeros" in tensors else None


def _interleaved(values: torch.Tensor) -> torch.Tensor:
    """uint8 [n, N] -> int32 [n, N / 8]."""
    return pack(values.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1), BITS)


def _in_order(stored: torch.Tensor) -> torch.Tensor:
    """The inverse: uint8 [n, N]."""
    codes = unpack(stored, BITS, 8 * stored.shape[1]).unflatten(1, (-1, 8))
    return codes[..., [ORDER.index(i) for i in range(8)]].flatten(1)
